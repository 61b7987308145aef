"""One copy of a checkpoint on each node, shared by the node's actors.

    CACHE_DIR/                   locked by the process that evicts and copies
    CACHE_DIR/FINGERPRINT/       a whole entry; its users lock it shared, eviction exclusively
    CACHE_DIR/FINGERPRINT.part/  a copy in progress, or the rest of a killed one

Every use reads the entry whole and compares its fingerprint. Before a copy, eviction removes unused entries except
the two used last; on a full disk, those too. The directories themselves are locked, so a full disk stops no lock, and
the kernel releases the locks of a process that ends. The cache must be on a disk of the node itself: over NFS these
locks hold within one node only.
"""

import fcntl
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from ray_probe.checkpoints.files import ADAPTER_FILES, CHECKPOINT_FILES, matching_files, unusable
from ray_probe.checkpoints.fingerprint import fingerprint
from ray_probe.errors import OutputError, bad_value
from ray_probe.system.files import write_remedy

KEPT = 2
_PART = ".part"


@dataclass
class NodeCopy:
    """The directories to load from; `release` allows the removal of cached ones.

    Attributes:
        directory: of the checkpoint.
        adapter: of the adapter, or None.
    """

    directory: Path
    adapter: Path | None
    _locks: ExitStack = field(default_factory=ExitStack)

    def release(self) -> None:
        """Allow the removal of the copies."""
        self._locks.close()


def node_copy(
    cache_dir: str | None, directory: Path, expected: str, adapter: Path | None = None, adapter_expected: str = ""
) -> NodeCopy:
    """Return the node's copies, made if need be, or the originals without a cache.

    Args:
        cache_dir: `model.cache_dir`.
        directory: of the checkpoint.
        expected: its fingerprint.
        adapter: directory of the adapter on it, or None.
        adapter_expected: its fingerprint.

    Raises:
        CheckpointError: the originals do not have these fingerprints.
        OutputError: the cache cannot be written, for example on a full disk.
    """
    if cache_dir is None:
        return NodeCopy(directory, adapter)
    cache = Path(cache_dir)
    with ExitStack() as locks:
        copy = _entry(cache, directory, expected, CHECKPOINT_FILES, "model.path", locks)
        of_adapter = None
        if adapter is not None:
            of_adapter = _entry(cache, adapter, adapter_expected, ADAPTER_FILES, "model.adapter", locks)
        return NodeCopy(copy, of_adapter, locks.pop_all())


def _entry(cache: Path, source: Path, digest: str, patterns: Sequence[str], field: str, locks: ExitStack) -> Path:
    """Return the whole entry of `source`; `locks` protects it from eviction."""
    entry, copied = cache / digest, None
    with _disk(cache):
        cache.mkdir(mode=0o700, parents=True, exist_ok=True)
    while True:
        with ExitStack() as lock:
            found = _lock(entry, fcntl.LOCK_SH, lock)
            if found is not None and _is_whole(entry, digest, patterns) and _inode(entry) == found:
                os.utime(entry)  # eviction goes by this time
                locks.push(lock.pop_all())
                return entry
            if found is not None and found == copied:
                raise unusable(
                    source,
                    f"its files are not what the run measures ({digest[:12]})",
                    "do not change them while it runs",
                    field,
                )
            with _disk(cache):
                _lock(cache, fcntl.LOCK_EX, lock)
                if _inode(entry) in (found, None):  # otherwise another actor made it in the meantime
                    copied = _copy(cache, entry, matching_files(source, patterns))


def _copy(cache: Path, entry: Path, files: Sequence[Path]) -> int | None:
    """Put a copy of `files` in place, in front of a damaged one; returns its inode."""
    needed = sum(file.stat().st_size for file in files)
    _evict(cache, KEPT)
    if shutil.disk_usage(cache).free < needed:
        _evict(cache, 0)
    free = shutil.disk_usage(cache).free
    if free < needed:
        what = f"{needed / 1e9:.2f} GB are needed and {free / 1e9:.2f} GB are free"
        raise OutputError(_not_copied(cache, what, "make room"))
    part = entry.with_name(entry.name + _PART)
    part.mkdir(mode=0o700)
    try:
        for file in files:
            shutil.copyfile(file, part / file.name)
        shutil.rmtree(entry, ignore_errors=True)
        part.rename(entry)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return _inode(entry)


def _evict(cache: Path, kept: int) -> None:
    """Remove unused entries except the `kept` used last, and rests of killed copies."""
    for part in cache.glob("*" + _PART):
        shutil.rmtree(part, ignore_errors=True)
    entries = [path for path in cache.iterdir() if path.is_dir()]
    for entry in sorted(entries, key=lambda entry: entry.stat().st_mtime, reverse=True):
        with ExitStack() as lock, suppress(BlockingIOError):  # it is in use
            _lock(entry, fcntl.LOCK_EX | fcntl.LOCK_NB, lock)
            if kept <= 0:
                shutil.rmtree(entry, ignore_errors=True)
            kept -= 1


def _lock(entry: Path, how: int, locks: ExitStack) -> int | None:
    """Lock a directory until `locks` closes; returns its inode, or None if absent."""
    try:
        descriptor = os.open(entry, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    locks.callback(os.close, descriptor)
    fcntl.flock(descriptor, how)
    return os.fstat(descriptor).st_ino


def _is_whole(entry: Path, digest: str, patterns: Sequence[str]) -> bool:
    try:
        return fingerprint(entry, patterns) == digest
    except OSError:  # another actor replaces a damaged entry
        return False


def _inode(path: Path) -> int | None:
    with suppress(FileNotFoundError):
        return path.stat().st_ino
    return None


@contextmanager
def _disk(cache: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OutputError(_not_copied(cache, error.strerror or str(error), write_remedy(error))) from error


def _not_copied(cache: Path, what: str, remedy: str) -> str:
    remedy = f"a checkpoint cannot be copied there ({what}); {remedy}, name another directory, or set it to null"
    return bad_value("model.cache_dir", str(cache), remedy)
