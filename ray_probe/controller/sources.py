"""The files that a queued measurement reads, as they were when it was queued.

A stamp (names, sizes and times of the files) is taken at once. The fingerprint reads every byte, so it follows later;
until then unchanged stamps mean unchanged bytes.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from ray_probe.checkpoints.files import ADAPTER_FILES, CHECKPOINT_FILES, matching_files, stamp_of
from ray_probe.checkpoints.fingerprint import fingerprint
from ray_probe.config import ProbeConfig
from ray_probe.errors import CheckpointError, InputError, PromptsError, bad_value
from ray_probe.run.preparation.prepared import PreparedRun
from ray_probe.system.digests import sha256_of

Field = Literal["model.path", "model.adapter", "compare.against", "compare.adapter", "data.prompts"]
How = Literal["link", "copy"]
_PATTERNS: dict[Field, Sequence[str]] = {
    "model.path": CHECKPOINT_FILES, "model.adapter": ADAPTER_FILES,
    "compare.against": CHECKPOINT_FILES, "compare.adapter": ADAPTER_FILES,
}  # fmt: skip


@dataclass(frozen=True)
class Source:
    """Files that a measurement reads.

    Attributes:
        field: of the configuration.
        place: the directory that holds them; for prompts, the file.
        stamp: sha256 over names, sizes and times of change when it was queued, hexadecimal.
        fingerprint: sha256 over names and contents, hexadecimal; None before it is computed.
        pinned: directory of the pinned files, or None.
        how: pinned by hard links or as copies; None: not pinned.
    """

    field: Field
    place: str
    stamp: str = ""
    fingerprint: str | None = None
    pinned: str | None = None
    how: How | None = None

    @property
    def files(self) -> list[Path]:
        """The pinned or original files, by name; [] if they are gone."""
        place = Path(self.pinned or self.place)
        if self.field == "data.prompts":
            return [place] if place.is_file() else []
        return matching_files(place, _PATTERNS[self.field])

    def stamped(self) -> "Source":
        """Returns a copy with the present stamp. Raises OSError when a file is gone."""
        return replace(self, stamp=stamp_of(self.files))

    def fingerprinted(self) -> "Source":
        """Returns a copy with the present fingerprint. Raises OSError."""
        place = Path(self.pinned or self.place)
        if self.field == "data.prompts":
            return replace(self, fingerprint=sha256_of(place))
        return replace(self, fingerprint=fingerprint(place, _PATTERNS[self.field]))


def sources_of(
    config: ProbeConfig, directory: Path, adapter: Path | None, against: tuple[Path, Path | None] | None = None
) -> list[Source]:
    """Returns the sources of a measurement, without stamps.

    Args:
        config: of the measurement.
        directory: of its checkpoint.
        adapter: directory of its adapter, or None.
        against: of a comparison, directories of checkpoint A and of its adapter.
    """
    places: list[tuple[Field, Path | None]] = [("model.path", directory), ("model.adapter", adapter)]
    if against is not None:
        places += [("compare.against", against[0]), ("compare.adapter", against[1])]
    found = [Source(field, str(place)) for field, place in places if place is not None]
    prompts = config.data.prompts
    if isinstance(prompts, str) and Path(prompts).is_file():
        found.append(Source("data.prompts", str(Path(prompts).resolve())))
    return found


def check_unchanged(sources: Iterable[Source], queued: str, now: str) -> None:
    """Refuses files that changed since the measurement was queued.

    Where the fingerprint is known, another time with the same bytes is not a change.

    Args:
        sources: as they were when it was queued.
        queued: UTC time of that.
        now: UTC time.

    Raises:
        InputError: one line with both times.
    """
    for source in sources:
        try:
            if source.stamped().stamp == source.stamp:
                continue
            found = source.fingerprinted().fingerprint if source.files else None
        except OSError:
            found = None
        if found is None or found != source.fingerprint:
            raise _changed(source, found, queued, now)


def check_measured(sources: Iterable[Source], prepared: PreparedRun, queued: str, now: str) -> None:
    """Raises InputError for a prepared run with other fingerprints than when queued."""
    checkpoint, against = prepared.checkpoint, prepared.against
    measured = {"model.path": checkpoint.fingerprint, "model.adapter": checkpoint.adapter_fingerprint}
    if against is not None:
        measured |= {"compare.against": against.fingerprint, "compare.adapter": against.adapter_fingerprint}
    for source in sources:
        found = measured.get(source.field)
        if None not in (found, source.fingerprint) and found != source.fingerprint:
            raise _changed(source, found, queued, now)
    check_unchanged((source for source in sources if source.fingerprint is None), queued, now)


def _changed(source: Source, found: str | None, queued: str, now: str) -> InputError:
    kind = PromptsError if source.field == "data.prompts" else CheckpointError
    before = "" if source.fingerprint is None else f" with fingerprint {source.fingerprint[:12]}"
    after = "their bytes are gone" if found is None else f"their fingerprint is {found[:12]}"
    what = "the pinned files" if source.pinned else "its files"
    said = f"{what} have changed since it was queued at {queued}{before}: at {now} {after}"
    return kind(bad_value(source.field, source.place, f"{said}; {_remedy(source)}"))


def _remedy(source: Source) -> str:
    if source.field == "data.prompts":
        return "queue it again, and leave the file as it is until it is measured"
    if source.how == "link":
        return "they are written in place, so queue it again with probe --snapshot-copy"
    if source.how == "copy":
        return "nothing but the service may write there; queue it again"
    return "queue it again, and leave it as it is until it is measured, or pin it with probe --snapshot"
