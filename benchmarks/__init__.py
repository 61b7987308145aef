"""Measurements of speed and memory.

Each prints a table and writes JSON to benchmarks/results/.
"""

import os

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # as in rollout actors; torch reads it once
