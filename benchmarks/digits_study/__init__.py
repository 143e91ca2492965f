"""The study behind `python benchmarks/digits.py`: worlds, methods, one run, the plan of all runs, and the report."""
