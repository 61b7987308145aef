"""Named places where tests make a process fail.

A place does nothing unless the environment variable `RAY_PROBE_FAILPOINTS` names a directory that holds a file of the
place's name. Only tests set that variable. The file is a JSON object:

    {"action": "kill" | "raise" | "sleep", "times": 1, "only": null, "seconds": 0}

`kill` ends the process with SIGKILL, `raise` raises RuntimeError, `sleep` sleeps for `seconds`. With `only` the place
fails for that detail alone, a shard's id for example. It fails `times` times over all processes: each failure creates
a file `NAME.1`, `NAME.2`, ..., which only one process can do, so a restarted process continues the count.

| place | detail | where |
| --- | --- | --- |
| `fit_before_write`, `fit_torn`, `fit_after_fsync` | shard | a record arrived, is half written, is on disk |
| `close_before_write`, `close_torn`, `close_after_fsync` | round | the same for the end of a round |
| `different_before_write`, `different_torn`, `different_after_fsync` | shard | the same for other bytes of a shard |
| `write_before_add`, `write_after_add` | start | a bucket of the gradient arrived, is on disk |
| `write_before_commit`, `write_after_commit` | rounds | all buckets are on disk, are committed |
| `write_before_settle`, `write_after_settle` | rounds | the earlier state exists, is removed |
| `roll_before_send`, `roll_after_send` | shard | a rollout actor has a record, has the fitter's answer to it |
| `roll_before_gradient` | shard | a rollout actor is about to add a shard's gradient |
| `roll_before_load` | | a rollout actor is about to load a checkpoint |
| `head_before_ray` | | a head is about to start Ray |
| `plots_before_write` | | result.json is on disk, the plots are not |
| `end_before_close` | | a controller is asked to end |
"""

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

VARIABLE = "RAY_PROBE_FAILPOINTS"


def fail_at(name: str, detail: str = "", first: Callable[[], object] = lambda: None) -> None:
    """Fail here if a test asks for it.

    Args:
        name: of the place.
        detail: identifies the shard, round or bucket.
        first: called just before the failure.
    """
    directory = os.environ.get(VARIABLE)
    if directory:
        _fail_if_armed(Path(directory), name, detail, first)


def _fail_if_armed(directory: Path, name: str, detail: str, first: Callable[[], object]) -> None:
    try:
        asked = json.loads((directory / name).read_text())
    except FileNotFoundError:
        return
    if asked["only"] not in (None, detail) or not _is_due(directory, name, asked["times"]):
        return
    first()
    if asked["action"] == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if asked["action"] == "raise":
        raise RuntimeError(f"failpoint {name} {detail}".rstrip())
    time.sleep(asked["seconds"])


def _is_due(directory: Path, name: str, times: int) -> bool:
    """Takes one of the failures that are left; returns whether there was one."""
    for number in range(1, times + 1):
        try:
            os.close(os.open(directory / f"{name}.{number}", os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
        except FileExistsError:
            continue
        return True
    return False
