"""Which services and runs of this user are live: a file each (0600) in a directory of the user's own (0700).

Holds where a cluster is and where its token lies, never the token.
"""

import contextlib
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from ray_probe.errors import ConfigError, bad_value


@dataclass(frozen=True)
class Entry:
    """A live service or run.

    Attributes:
        name: of the service or run.
        kind: service or run.
        address: host:port of the cluster's head.
        namespace: Ray namespace of its actors.
        token_path: file of the cluster's token where ray_probe made it, else None.
        loopback: ray_probe started the cluster, on this machine alone.
        directory: where its files are.
        started: UTC, ISO 8601.
        pid: process that it ends with: a run's own, or the head that a service owns; None for a service elsewhere.
        pid_created: when that process began, see `created`: a pid may come again.
    """

    name: str
    kind: str
    address: str
    namespace: str
    token_path: str | None
    loopback: bool
    directory: str
    started: str
    pid: int | None = None
    pid_created: float | None = None

    @property
    def gone(self) -> bool:
        """The process that it ends with is no more; False where there is none to look at."""
        return self.pid is not None and created(self.pid) != self.pid_created


def created(pid: int) -> float | None:
    """Seconds from the machine's start to the process's; None when it is gone, or dead and not reaped yet.

    No time of day: that moves, for a process that lives, when the clock is set or a virtual machine wakes up.
    """
    with contextlib.suppress(psutil.Error):
        boot_time, process = psutil.boot_time(), psutil.Process(pid)
        if process.status() != psutil.STATUS_ZOMBIE:
            return round(process.create_time() - boot_time, 2)  # the kernel counts in hundredths
    return None


def place() -> Path:
    """The directory of the entries: `ray_probe` in XDG_STATE_HOME or ~/.local/state."""
    state = os.environ.get("XDG_STATE_HOME", "")
    return (Path(state) if os.path.isabs(state) else Path.home() / ".local" / "state") / "ray_probe"


def register(entry: Entry) -> None:
    """Put an entry down, in the place of an earlier one of its name. Raises ConfigError when it cannot be written."""
    directory = place()
    try:
        _write(directory, entry)
    except OSError as error:
        remedy = f"{directory} cannot be written ({error.strerror}); set it to a directory of yours"
        raise ConfigError(bad_value("XDG_STATE_HOME", str(directory.parent), remedy)) from None


def _write(directory: Path, entry: Entry) -> None:
    for missing in reversed([path for path in (directory, *directory.parents) if not path.exists()]):
        missing.mkdir(mode=0o700, exist_ok=True)
    directory.chmod(0o700)
    temporary = directory / f".{entry.name}.{os.getpid()}"
    temporary.unlink(missing_ok=True)
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    with open(descriptor, "w", encoding="utf-8") as file:
        json.dump(asdict(entry), file, indent=1)
    temporary.replace(directory / f"{entry.name}.json")


def refuse_second(field: str, name: str) -> None:
    """Refuse a name that something live has. Raises ConfigError saying what."""
    entry = read(name)
    if entry is not None and not entry.gone:
        remedy = (
            f"a {entry.kind} of that name is up since {entry.started}: ask it with `status --run {name}`, end it with"
        )
        remedy += f" `down --run {name}`," if entry.kind == "service" else " Ctrl-C where it runs,"
        raise ConfigError(bad_value(field, name, f"{remedy} or choose another"))


def unregister(name: str) -> None:
    """Take an entry away, if it is there."""
    (place() / f"{name}.json").unlink(missing_ok=True)


@contextlib.contextmanager
def registered(entry: Entry) -> Iterator[None]:
    """An entry for the block."""
    register(entry)
    try:
        yield
    finally:
        if read(entry.name) == entry:
            unregister(entry.name)


def entries() -> list[Entry]:
    """Live entries by name; those whose process is gone, and files that cannot be read, are left out."""
    return [entry for entry in all_entries() if not entry.gone]


def all_entries() -> list[Entry]:
    """Entries by name that can be read, be they live or not."""
    found = [read(path.stem) for path in sorted(place().glob("*.json"))]
    return [entry for entry in found if entry is not None]


def read(name: str) -> Entry | None:
    """The entry of that name, be it live or not; None without one that can be read."""
    try:
        return Entry(**json.loads((place() / f"{name}.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def choose(name: str | None) -> Entry:
    """The entry of that name; None: the only one there is. Raises ConfigError naming what there is."""
    there = entries()
    names = ", ".join(f"{entry.name} ({entry.kind})" for entry in there)
    lost = [
        entry.name for entry in all_entries() if entry.kind == "service" and entry.gone and name in (None, entry.name)
    ]
    if lost and (name is not None or not there):
        again = f"up CONFIG --name {lost[0]} goes on with what it had"
        raise ConfigError(f"--run: the service {lost[0]!r} has lost its head, process and all; {again}")
    if name is None:
        if not there:
            raise ConfigError("--run: nothing is up; start a service: up CONFIG")
        if len(there) > 1:
            raise ConfigError(f"--run: there are {names}; choose one with --run NAME")
        return there[0]
    for entry in there:
        if entry.name == name:
            return entry
    raise ConfigError(bad_value("--run", name, f"nothing of that name is up; there is {names or 'nothing'}"))
