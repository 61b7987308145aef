"""Measurements behind the README's figures; each writes a table to the screen and JSON to benchmarks/results/."""
