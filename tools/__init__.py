"""Commands around runs: `python -m tools.analyze`, `compare`, `export`, `count_parameters`, `estimate_memory`."""
