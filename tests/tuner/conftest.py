"""What test_peft_matrix.py and test_peft_adapters.py share: models with the adapters of one table."""

from peft_cases import at, folders, table  # noqa: F401
