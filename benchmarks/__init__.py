"""Measurements behind the figures of docs/; each writes a table to the screen and JSON to benchmarks/results/."""

import os

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # as rollout actors have it; torch reads it once
