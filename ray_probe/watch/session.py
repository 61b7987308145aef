"""Opens a watch on a directory and a service, and looks until it is to end."""

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from ray_probe.config.field_types import RunName
from ray_probe.errors import ClusterError, ConfigError, NoClusterError, bad_value
from ray_probe.system.files import held, write_remedy
from ray_probe.watch.candidates import checkpoints
from ray_probe.watch.conversion import Converter, Process, split
from ray_probe.watch.entries import Entries, Entry
from ray_probe.watch.model_files import CONFIG, has_config, kind_of
from ray_probe.watch.queueing import Queueing, SeriesOptions, ServiceClient
from ray_probe.watch.spool import Spool
from ray_probe.watch.watcher import Watcher, WatchOptions

POLL_S = 2.0
SLOW_S = 30.0
"""Longest pause between two looks."""
SILENT_S = 300.0
"""A watch ends when its service has not answered for so long; it goes on when it is started again."""

OWN = ".ray_probe"
LOCK = "watch.lock"
GIVE = "give the trainer's output directory"
INCOMPLETE = 3
"""Exit code where a checkpoint is not measured."""
_GENERIC = {"out", "output", "outputs", "checkpoints", "checkpoint", "ckpt", "broadcasts", "exports", "results", "hf"}


@dataclass(frozen=True)
class WatchRequest:
    """What the user asks for.

    Attributes:
        root: directory below which the trainer writes.
        series: name of the series; None: from the directory's.
        spool: of the trainer's requests and of the watch's own files; None: `.ray_probe` in the directory.
        base: model that completes checkpoints, or None.
        every: take each such checkpoint.
        from_step: leave out earlier steps.
        latest: leave out a checkpoint when a newer one is there.
        gradient: also take gradients.
        convert: command for sharded checkpoints, or None.
        settings: of each measurement, by dotted key.
    """

    root: Path
    series: str | None = None
    spool: Path | None = None
    base: Path | None = None
    every: int = 1
    from_step: int = 0
    latest: bool = False
    gradient: bool = True
    convert: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)

    def checked(self) -> "WatchRequest":
        """Return the request with absolute paths and a name. Raises ConfigError."""
        root, base = self.root.resolve(), None if self.base is None else self.base.resolve()
        if not root.is_dir():
            raise ConfigError(bad_value("DIR", str(self.root), f"no such directory; {GIVE}"))
        if kind_of(root) != "none" and has_config(root) and not checkpoints(root):
            raise ConfigError(bad_value("DIR", str(self.root), "it is a checkpoint; give the directory above it"))
        if base is not None and not has_config(base):
            raise ConfigError(bad_value("--base", str(self.base), f"it has no {CONFIG}; give a model's directory"))
        if self.every < 1:
            raise ConfigError(bad_value("--every", self.every, "need an integer >= 1"))
        if self.from_step < 0:
            raise ConfigError(bad_value("--from", self.from_step, "need an integer >= 0"))
        if self.convert is not None:
            split(self.convert)
        series, spool = self.series or default_series(root), (self.spool or root / OWN).resolve()
        try:
            TypeAdapter(RunName).validate_python(series)
        except ValidationError:
            need = "need 1 to 63 of a-z, 0-9, _ and -, with a letter or digit first"
            raise ConfigError(bad_value("--name", series, need)) from None
        return WatchRequest(
            root, series, spool, base, self.every, self.from_step, self.latest, self.gradient, self.convert,
            self.settings,
        )  # fmt: skip


def default_series(root: Path) -> str:
    """Return the name of the series of a directory."""
    names = [root.parent.name, root.name] if root.name.lower() in _GENERIC else [root.name]
    slug = re.sub(r"[^a-z0-9_-]+", "-", "-".join(filter(None, names)).lower()).strip("-_")
    return slug[:63] or "series"


@dataclass(frozen=True)
class Watch:
    """A watch that is open.

    Attributes:
        watcher: looks at directory and service.
        entries: of the series.
    """

    watcher: Watcher
    entries: Entries

    def until_end(
        self, once: bool, clock: Callable[[], float], wait: Callable[[float], None], log: Callable[[str], None]
    ) -> None:
        """Look again and again; with `once` until all that is there is measured.

        Args:
            once: end when nothing is left to wait for but the trainer.
            clock: seconds, never set back.
            wait: waits for some seconds; it may raise KeyboardInterrupt.
            log: receives messages.

        Raises:
            ClusterError: the service is gone, or has not answered for `SILENT_S`.
        """
        silent_since: float | None = None
        while True:
            started = clock()
            try:
                self.watcher.step()
                silent_since = None
                if once and self.watcher.settled():
                    return
            except NoClusterError:
                raise
            except ClusterError as error:
                if silent_since is None:
                    silent_since = clock()
                    log(f"{error}; checkpoints are pinned all the same, and queued once it answers")
                elif clock() - silent_since > SILENT_S:
                    raise
            # Where a look takes long, on a busy file system or with large files to read, looks are rarer.
            wait(min(max(POLL_S, clock() - started), SLOW_S))

    def refuse_empty(self, root: Path) -> None:
        """Raise ConfigError where no checkpoint was found."""
        if not self.entries.items and not self.entries.others:
            raise ConfigError(bad_value("DIR", str(root), f"no checkpoint is in it; {GIVE}"))

    @property
    def code(self) -> int:
        """Exit code: 3 where a checkpoint is not measured that no option leaves out."""
        codes = [entry.code for entry in self.entries.items]
        every = [*self.entries.items, *self.entries.others.values()]
        left = [entry for entry in every if entry.state not in ("measured", "queued") and not entry.chosen]
        return max([*codes, INCOMPLETE if left else 0])


@contextlib.contextmanager
def opened(
    request: WatchRequest, client: ServiceClient, responses: int | None, locks: Path, clock: Callable[[], float],
    say: Callable[[Entry], None], log: Callable[[str], None],
) -> Iterator[Watch]:  # fmt: skip
    """Open a watch; its locks are held for the block.

    Args:
        request: a checked request.
        client: of the service.
        responses: the service's `batch.responses_per_prompt`; None: not known.
        locks: directory of this user's locks.
        clock: seconds, never set back.
        say: receives an entry whose state is new, or whose reason is.
        log: receives messages.

    Raises:
        ConfigError: another watch has the series, or the state file is damaged.
    """
    assert request.series is not None and request.spool is not None, "it is checked"
    directory, status = request.spool / "watch" / request.series, client.status()
    settings = dict(request.settings)
    own = settings.pop("batch.responses_per_prompt", responses)
    with contextlib.ExitStack() as stack:
        for place, name in ((directory, LOCK), (locks, f"watch-{status.name}-{request.series}.lock")):
            _make(place)
            stack.enter_context(held(place / name, 0.0, lambda holder: _refused(request.series, holder)))
        entries = Entries(directory, request.series, status.directory)
        options = SeriesOptions(request.series, request.gradient, request.latest, own, settings)
        queueing = Queueing(entries, client, options, clock, say)
        converter = None
        if request.convert is not None:
            converter = Converter(directory, request.convert, request.base, Process)
            stack.callback(converter.close)
        taken = WatchOptions(request.base, request.every, request.from_step)
        spool = Spool(request.spool, log)
        yield Watch(Watcher(request.root, directory, entries, queueing, spool, taken, clock, say, converter), entries)


def _make(place: Path) -> None:
    try:
        place.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        remedy = f"the watch keeps its files there, and it cannot be made ({error.strerror}); {write_remedy(error)}"
        raise ConfigError(bad_value("--spool", str(place), remedy)) from None


def _refused(series: str | None, holder: str) -> str:
    return bad_value("--name", series, f"{holder} watches this series; end it, or give another name")
