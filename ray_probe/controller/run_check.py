"""The check of a run directory before anything is started for it. numpy only."""

from collections.abc import Callable
from pathlib import Path

from ray_probe.fitter.ledger import check_ledger
from ray_probe.gradient.store import DAMAGED, state_name, unusable
from ray_probe.run.directory import RunDirectory
from ray_probe.system.digests import sha256_of

SAID_FROM_BYTES = 2**30


def check_run(directory: RunDirectory, tell: Callable[[str], None] = lambda text: None) -> None:
    """Refuse a run directory that is not as the run left it: every file that a resume reads is read through.

    Args:
        directory: of the run; no process is at work on it.
        tell: receives a line about what takes long.

    Raises:
        ConfigError: a file is missing or damaged; names it.
        LedgerError: the ledger is.
    """
    directory.check_start()
    lines = directory.committed_rounds()
    directory.restore(len(lines))
    check_ledger(directory.ledger, [entry.records for entry in lines])
    if lines:
        _check_gradient(directory.state / state_name(len(lines)), directory.gradient_sha256(len(lines)), tell)


def _check_gradient(path: Path, recorded: str | None, tell: Callable[[str], None]) -> None:
    try:
        if (size := path.stat().st_size) >= SAID_FROM_BYTES:
            tell(f"checking the committed gradient, {size / 1e9:.1f} GB")
        found = sha256_of(path)
    except OSError as error:
        raise unusable(path, f"cannot be read ({error})") from None
    if found != recorded:
        raise unusable(path, DAMAGED)
