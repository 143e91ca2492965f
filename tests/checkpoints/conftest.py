"""A hub and a model to put on it, for every file of this folder."""

from hub_models import hub, llm  # noqa: F401
