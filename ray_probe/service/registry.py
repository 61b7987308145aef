"""Which services and runs of this user are live: a file each (0600) in a directory of the user's own (0700).

Holds where a cluster is and where its token lies, never the token.
"""

import contextlib
import json
import os
import socket
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from ray_probe.errors import ConfigError, bad_value
from ray_probe.system.processes import created


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
        host: name of the machine that wrote the entry; a home directory may be shared by several.
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
    host: str = field(default_factory=socket.gethostname)

    @property
    def is_of_this_host(self) -> bool:
        """The entry was written on this machine, so its process can be looked at."""
        return self.host == socket.gethostname()

    @property
    def gone(self) -> bool:
        """The process that it ends with has ended; False where that cannot be seen from here."""
        return self.pid is not None and self.is_of_this_host and created(self.pid) != self.pid_created

    @property
    def file(self) -> Path:
        """The file of the entry."""
        return place() / f"{self.name}.json"


def place() -> Path:
    """The directory of the entries: `ray_probe` in XDG_STATE_HOME or ~/.local/state."""
    state = os.environ.get("XDG_STATE_HOME", "")
    return (Path(state) if os.path.isabs(state) else Path.home() / ".local" / "state") / "ray_probe"


def register(entry: Entry) -> None:
    """Put an entry down, in the place of an earlier one of its name; those whose process is gone are removed.

    Raises ConfigError when it cannot be written.
    """
    directory = place()
    for earlier in all_entries():
        if earlier.gone:
            forget(earlier)
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


def forget(entry: Entry) -> None:
    """Take an entry away unless another has its place by now."""
    if read(entry.name) == entry:
        unregister(entry.name)


@contextlib.contextmanager
def registered(entry: Entry) -> Iterator[None]:
    """An entry for the block."""
    register(entry)
    try:
        yield
    finally:
        forget(entry)


def entries() -> list[Entry]:
    """Live entries by name; those of killed runs are removed, and files that cannot be read are left out.

    The entry of a service whose head was killed stays until the next `register` or `down`: `choose` tells of it. A
    head that listens on the loopback address of another machine cannot be asked from here, and is left out.
    """
    there = all_entries()
    for entry in there:
        if entry.kind == "run" and entry.gone:
            forget(entry)
    return [entry for entry in there if not entry.gone and (entry.is_of_this_host or not entry.loopback)]


def lost_services() -> list[Entry]:
    """Services whose head was killed on this machine."""
    return [entry for entry in all_entries() if entry.kind == "service" and entry.gone]


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


def choose(name: str | None, kind: str | None = None) -> Entry:
    """The entry that is meant.

    Args:
        name: of the service or run; None: the only one there is.
        kind: of what is looked for without a name, service or run; None: either.

    Raises:
        ConfigError: nothing is up, or several are and none is named; names what there is.
    """
    there = entries()
    if name is not None:
        return _named(name, there)
    fitting = [entry for entry in there if kind in (None, entry.kind)]
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        raise ConfigError(f"--run: there are {_listed(fitting)}; choose one with --run NAME")
    if lost := lost_services():
        raise _lost(lost[0])
    if there:
        raise ConfigError(f"--run: no {kind} is up; start one: up CONFIG; --run NAME chooses among {_listed(there)}")
    raise ConfigError("--run: nothing is up; start a service: up CONFIG")


def _named(name: str, there: Sequence[Entry]) -> Entry:
    for entry in there:
        if entry.name == name:
            return entry
    for entry in all_entries():
        if entry.name == name and entry.kind == "service" and entry.gone:
            raise _lost(entry)
        if entry.name == name and not entry.is_of_this_host:
            remedy = f"it listens on {entry.address} of {entry.host} alone; ask it there"
            raise ConfigError(bad_value("--run", name, remedy))
    raise ConfigError(bad_value("--run", name, f"nothing of that name is up; there is {_listed(there) or 'nothing'}"))


def _lost(entry: Entry) -> ConfigError:
    again = f"up CONFIG --name {entry.name} goes on with what it had"
    return ConfigError(f"--run: the service {entry.name!r} has lost its head, process and all; {again}")


def _listed(entries: Sequence[Entry]) -> str:
    return ", ".join(f"{entry.name} ({entry.kind})" for entry in entries)
