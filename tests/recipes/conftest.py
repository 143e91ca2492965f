"""Runs of the recipes, for every file of this folder."""

from recipe_runs import data, pair, texts, train  # noqa: F401
