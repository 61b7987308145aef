"""Checks a run directory before Ray is started for it."""

from collections.abc import Callable
from pathlib import Path

from ray_probe.fitter.ledger import check_ledger
from ray_probe.gradient.state_file import DAMAGED, state_name, unusable
from ray_probe.run.directory import RunDirectory
from ray_probe.system.digests import sha256_of

SAID_FROM_BYTES = 2**30


def check_run(directory: RunDirectory, tell: Callable[[str], None] = lambda text: None) -> None:
    """Reads every file that a resume needs, and refuses damaged ones.

    Args:
        directory: of the run, which no other process uses.
        tell: receives a line about a check that takes long.

    Raises:
        ConfigError: a file is missing or damaged.
        LedgerError: the ledger is damaged.
    """
    directory.check_start()
    lines = directory.committed_rounds()
    directory.restore(len(lines))
    check_ledger(directory.ledger, [entry.records for entry in lines])
    digests = directory.gradient_digests()
    for rounds in sorted({directory.gradient_window(), len(lines)} - {0}):
        _check_gradient(directory.state / state_name(rounds), digests.get(rounds), tell)


def _check_gradient(path: Path, recorded: str | None, tell: Callable[[str], None]) -> None:
    try:
        if (size := path.stat().st_size) >= SAID_FROM_BYTES:
            tell(f"checking the committed gradient, {size / 1e9:.1f} GB")
        found = sha256_of(path)
    except OSError as error:
        raise unusable(path, f"cannot be read ({error})") from None
    if found != recorded:
        raise unusable(path, DAMAGED)
