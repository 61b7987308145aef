"""The live services and runs of this user, each in a file of its own (0600).

An entry holds the address of a cluster and the path of its token, never the token.
"""

import contextlib
import json
import os
import socket
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
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
        token_path: file of the cluster's token if ray_probe made it, else None.
        loopback: ray_probe started the cluster, which listens on loopback only.
        directory: of its files.
        started: UTC, ISO 8601.
        pid: process that it ends with: of a run, or of a service's own head; None for a service on another cluster.
        pid_created: start of that process, see `system.processes.created`, as process ids are reused.
        host: name of the machine that wrote the entry; machines may share a home directory.
        url: of its web server, without the token, or None.
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
    url: str | None = None

    @property
    def is_of_this_host(self) -> bool:
        """This machine wrote the entry."""
        return self.host == socket.gethostname()

    @property
    def gone(self) -> bool:
        """Its process has ended; False on other machines."""
        return self.pid is not None and self.is_of_this_host and created(self.pid) != self.pid_created

    @property
    def file(self) -> Path:
        """The file of the entry."""
        return _file(self.name)


def place() -> Path:
    """Returns the directory of entries: in XDG_STATE_HOME or ~/.local/state."""
    state = os.environ.get("XDG_STATE_HOME", "")
    return (Path(state) if os.path.isabs(state) else Path.home() / ".local" / "state") / "ray_probe"


def _file(name: str) -> Path:
    return place() / f"{name}.json"


def register(entry: Entry) -> None:
    """Writes an entry over one of the same name; removes entries of ended processes.

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
    temporary.replace(entry.file)


def refuse_second(field: str, name: str) -> None:
    """Raises ConfigError for the name of a live service or run."""
    entry = read(name)
    if entry is not None and not entry.gone:
        remedy = (
            f"a {entry.kind} of that name is up since {entry.started}: ask it with `status --run {name}`, end it with"
        )
        remedy += f" `down --run {name}`," if entry.kind == "service" else " Ctrl-C where it runs,"
        raise ConfigError(bad_value(field, name, f"{remedy} or choose another"))


def unregister(name: str) -> None:
    """Removes the entry of that name, if any."""
    _file(name).unlink(missing_ok=True)


def forget(entry: Entry) -> None:
    """Removes an entry unless another has replaced it."""
    there = read(entry.name)
    if there is not None and replace(there, url=entry.url) == entry:  # another process may have served it since
        unregister(entry.name)


def set_url(name: str, url: str | None) -> None:
    """Writes the URL of a service's or run's web server into its entry, if it has one."""
    entry = read(name)
    if entry is not None and entry.is_of_this_host:
        register(replace(entry, url=url))


@contextlib.contextmanager
def registered(entry: Entry) -> Iterator[None]:
    """Registers an entry for the block."""
    register(entry)
    try:
        yield
    finally:
        forget(entry)


def entries() -> list[Entry]:
    """Returns the live entries by name; removes those of killed runs.

    Leaves out unreadable files and heads on the loopback address of another machine. The entry of a service whose head
    was killed stays until the next `register` or `down`, so that `choose` can name it.
    """
    there = all_entries()
    for entry in there:
        if entry.kind == "run" and entry.gone:
            forget(entry)
    return [entry for entry in there if not entry.gone and (entry.is_of_this_host or not entry.loopback)]


def lost_services() -> list[Entry]:
    """Returns the services whose head was killed on this machine."""
    return [entry for entry in all_entries() if entry.kind == "service" and entry.gone]


def all_entries() -> list[Entry]:
    """Returns all readable entries by name, live or not."""
    found = [read(path.stem) for path in sorted(place().glob("*.json"))]
    return [entry for entry in found if entry is not None]


def read(name: str) -> Entry | None:
    """Returns the entry of that name, live or not; None if it is unreadable."""
    try:
        return Entry(**json.loads(_file(name).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def choose(name: str | None, kind: str | None = None) -> Entry:
    """Returns a live entry.

    Args:
        name: of the service or run; None: the only one.
        kind: service or run, to choose without a name; None: either.

    Raises:
        ConfigError: no such service or run, or several; names those that exist.
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
    again = f"up CONFIG --name {entry.name} resumes its measurements"
    return ConfigError(f"--run: the service {entry.name!r} has lost its head; {again}")


def _listed(entries: Sequence[Entry]) -> str:
    return ", ".join(f"{entry.name} ({entry.kind})" for entry in entries)
