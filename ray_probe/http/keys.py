"""Idempotency keys: a write that is repeated with its key is done once."""

import hashlib
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ray_probe.errors import ConfigError, StateError, bad_value
from ray_probe.system.files import write_atomically

KEPT = 1000
FIELD = "Idempotency-Key"


class IdempotencyKeys:
    """Keys of the newest writes with the ids that they gave, also after a restart.

    Args:
        path: file that holds them (0600); None: they are not written.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._at_work: set[str] = set()
        self._keys: dict[str, tuple[str, str | None]] = {}
        if path is not None and path.exists():
            read: dict[str, list[Any]] = json.loads(path.read_text(encoding="utf-8"))
            self._keys = {key: (digest, identity) for key, (digest, identity) in read.items()}

    def once(self, key: str | None, request: object, write: Callable[[], str]) -> str:
        """Return the id that a write gives, or gave when the key came first.

        Args:
            key: of the client; None: the write is done.
            request: of plain JSON types; another one with the same key is refused.
            write: returns an id.

        Raises:
            ConfigError: the key came with another request.
            StateError: the first write with the key has not ended, or its outcome is unknown.
        """
        if key is None:
            return write()
        digest = hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()
        if (known := self._begin(key, digest)) is not None:
            return known
        try:
            identity = write()
        except BaseException:
            self._end(key, None)
            raise
        self._end(key, (digest, identity))
        return identity

    def _begin(self, key: str, digest: str) -> str | None:
        """Return the id of an earlier write, or None for the caller to write."""
        with self._lock:
            earlier, identity = self._keys.get(key, (digest, ""))
            if earlier != digest:
                raise ConfigError(bad_value(FIELD, key, "it came with another request; take a new key for this one"))
            if key in self._at_work:
                raise StateError(bad_value(FIELD, key, "its first request is still at work; repeat this one later"))
            if identity is None:
                # The process died between the two lines that it writes for a key.
                remedy = "the server died during its first request; look into /v1/results, then take a new key"
                raise StateError(bad_value(FIELD, key, remedy))
            if identity:
                return identity
            self._at_work.add(key)
            self._keys[key] = (digest, None)
            self._save()
            return None

    def _end(self, key: str, outcome: tuple[str, str | None] | None) -> None:
        with self._lock:
            self._at_work.discard(key)
            self._keys.pop(key, None)  # at the end of the order, and of those that are kept
            if outcome is not None:
                self._keys[key] = outcome
            for oldest in list(self._keys)[: max(0, len(self._keys) - KEPT)]:
                del self._keys[oldest]
            self._save()

    def _save(self) -> None:
        if self._path is not None:
            write_atomically(self._path, json.dumps(self._keys).encode(), private=True)
