"""Experiments: each is a command, `python -m experiments.NAME`, whose results are in results/."""
