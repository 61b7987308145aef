"""One copy of a checkpoint on each node, made once and shared by the node's actors.

    CACHE_DIR/FINGERPRINT/       a whole entry, renamed into place
    CACHE_DIR/FINGERPRINT.part/  a copy under way, or what a crash left of one
    CACHE_DIR/FINGERPRINT.use    locked shared by whoever uses or makes the entry, exclusively by who removes it
    CACHE_DIR/FINGERPRINT.make   locked exclusively by who makes it

An entry is read through and compared with its fingerprint each time that it is handed out. Before another one is
made, entries that nobody uses are removed but for the two that were used last; where the disk is too full, those too.
Locks are the kernel's: they go with the process that held them. The directory should be on a disk of the node itself.
"""

import fcntl
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ray_probe.checkpoints.files import ADAPTER_FILES, CHECKPOINT_FILES, fingerprint, matching_files, refuse
from ray_probe.errors import OutputError, bad_value
from ray_probe.system.files import write_remedy

KEPT = 2
_PART, _OLD, _USE, _MAKE = ".part", ".old", ".use", ".make"


@dataclass
class NodeCopy:
    """Where a checkpoint and its adapter are loaded from; cached copies stay until `release` or the process's end.

    Attributes:
        directory: of the checkpoint.
        adapter: of the adapter, or None.
    """

    directory: Path
    adapter: Path | None
    _locks: tuple[int, ...] = ()

    def release(self) -> None:
        """Let the copies go: they may be removed to make room for others."""
        for descriptor in self._locks:
            os.close(descriptor)
        self._locks = ()


def node_copy(
    cache_dir: str | None, directory: Path, expected: str, adapter: Path | None = None, adapter_expected: str = ""
) -> NodeCopy:
    """The node's copies of a checkpoint and its adapter, made if need be; the originals where there is no cache.

    Args:
        cache_dir: `model.cache_dir`.
        directory: of the checkpoint.
        expected: its fingerprint.
        adapter: directory of the adapter on it, or None.
        adapter_expected: its fingerprint.

    Raises:
        CheckpointError: the originals are not what the fingerprints say.
        OutputError: the cache cannot be written: the disk is full, say.
    """
    if cache_dir is None:
        return NodeCopy(directory, adapter)
    cache = Path(cache_dir)
    wanted = [_Wanted(directory, expected, CHECKPOINT_FILES, "model.path")]
    if adapter is not None:
        wanted.append(_Wanted(adapter, adapter_expected, ADAPTER_FILES, "model.adapter"))
    locks: list[int] = []
    try:
        for one in wanted:
            locks.append(_entry(cache, one))
    except BaseException:
        for descriptor in locks:
            os.close(descriptor)
        raise
    return NodeCopy(cache / expected, None if adapter is None else cache / adapter_expected, tuple(locks))


@dataclass(frozen=True)
class _Wanted:
    source: Path
    digest: str
    patterns: Sequence[str]
    field: str


def _entry(cache: Path, wanted: _Wanted) -> int:
    """See to it that the entry is there and whole; returns the lock that keeps it."""
    with _disk(cache):
        cache.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = _locked(cache / (wanted.digest + _USE), fcntl.LOCK_SH)
    entry = cache / wanted.digest
    try:
        for attempt in range(2):
            seen = _identity(entry)
            if seen is not None and fingerprint(entry, wanted.patterns) == wanted.digest:
                os.utime(entry)  # used last
                return descriptor
            if attempt == 0:
                with _disk(cache), _making(cache / (wanted.digest + _MAKE)):
                    if _identity(entry) == seen:  # else somebody made it while this one waited
                        _make(cache, entry, matching_files(wanted.source, wanted.patterns))
        remedy = f"its files are not what the run measures ({wanted.digest[:12]}); keep a checkpoint as it is meanwhile"
        raise refuse(wanted.source, remedy, wanted.field)
    except BaseException:
        os.close(descriptor)
        raise


def _make(cache: Path, entry: Path, files: Sequence[Path]) -> None:
    part, old = (entry.with_name(entry.name + ending) for ending in (_PART, _OLD))
    needed = sum(file.stat().st_size for file in files)
    _evict(cache, entry.name, KEPT)
    if shutil.disk_usage(cache).free < needed:
        _evict(cache, entry.name, 0)
    free = shutil.disk_usage(cache).free
    if free < needed:
        what = f"{needed / 1e9:.2f} GB are needed and {free / 1e9:.2f} GB are free"
        raise OutputError(_not_copied(cache, what, "make room"))
    for leftover in (part, old):
        shutil.rmtree(leftover, ignore_errors=True)
    part.mkdir(mode=0o700)
    try:
        for file in files:
            shutil.copyfile(file, part / file.name)
        if entry.exists():  # damaged
            entry.rename(old)
        part.rename(entry)
    finally:
        for leftover in (part, old):
            shutil.rmtree(leftover, ignore_errors=True)


def _evict(cache: Path, own: str, kept: int) -> None:
    """Remove the entries that nobody uses, but for the `kept` used last, and what crashes left of others."""
    names = {path.name.removesuffix(ending) for ending in (_USE, _PART, _OLD) for path in cache.glob("*" + ending)}
    for name in sorted(names - {own}, key=lambda name: _last_used(cache / name), reverse=True):
        try:
            descriptor = _locked(cache / (name + _USE), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            continue
        for ending in (_PART, _OLD):
            shutil.rmtree(cache / (name + ending), ignore_errors=True)
        if kept > 0 and (cache / name).exists():
            kept -= 1
        else:
            shutil.rmtree(cache / name, ignore_errors=True)
            for ending in (_USE, _MAKE):
                (cache / (name + ending)).unlink(missing_ok=True)
        os.close(descriptor)


def _locked(path: Path, how: int) -> int:
    """A descriptor that holds the file's lock: of the file that has the name now, not of one that was removed."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, how)
            if _identity(path) == os.fstat(descriptor).st_ino:
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


@contextmanager
def _making(path: Path) -> Iterator[None]:
    descriptor = _locked(path, fcntl.LOCK_EX)
    try:
        yield
    finally:
        os.close(descriptor)


@contextmanager
def _disk(cache: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OutputError(_not_copied(cache, error.strerror or str(error), write_remedy(error))) from error


def _not_copied(cache: Path, what: str, remedy: str) -> str:
    remedy = f"a checkpoint cannot be copied there ({what}); {remedy}, name another directory, or set it to null"
    return bad_value("model.cache_dir", str(cache), remedy)


def _identity(path: Path) -> int | None:
    """Number of the file or directory that has the name now; None when there is none."""
    try:
        return path.stat().st_ino
    except FileNotFoundError:
        return None


def _last_used(entry: Path) -> float:
    try:
        return entry.stat().st_mtime
    except FileNotFoundError:
        return 0.0
