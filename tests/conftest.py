"""One torch thread, as in an actor: results have fixed bits, and tests do not fight over two cores.

Files are handed to workers in the order below, so that no worker is left with a long file at the end.
"""

from pathlib import Path

import pytest
import torch
from threadpoolctl import threadpool_limits

torch.set_num_threads(1)
threadpool_limits(limits=1)

HERE = Path(__file__).parent
DIRECTORIES = ("integration", "faults", "docs", "unit")
"""Those of `faults` follow one another: they share a cluster."""
LONGEST = (
    "test_service", "test_pool", "test_shared_cluster", "test_connection", "test_on_a_cluster", "test_nodes",
    "test_doctor_on_a_cluster", "test_watch", "test_readme_example", "test_signals", "test_writer", "test_stuck",
    "test_killer", "test_rollouts", "test_blame", "test_fitter", "test_controller", "test_adapter_kinds",
    "test_rollout", "test_unbiased_columns", "test_snapshots", "test_swap", "test_signal_handlers", "test_damaged_run",
)  # fmt: skip
"""Files that take longer than 10 s, longest first in each directory."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put long files first in their directories."""
    items.sort(key=lambda item: place_of(item.path))


def place_of(path: Path) -> tuple[int, int]:
    """Returns where a file comes; files of the same place stay in their order."""
    directory = path.relative_to(HERE).parts[0]
    return DIRECTORIES.index(directory), LONGEST.index(path.stem) if path.stem in LONGEST else len(LONGEST)
