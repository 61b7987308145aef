"""Judges one checkpoint directory: ready, waiting, to be converted, or skipped.

One rule for all layouts: config, weights and tokenizer are there and whole, no file has the name of an unfinished one,
and the layout's marker is there. Without a marker the files must have stayed as they are for a while.
"""

import json
from dataclasses import replace
from pathlib import Path

from ray_probe.watch.found import Found, Model, Stamp
from ray_probe.watch.layouts import DESTINATION, LAYOUTS, PATIENT_S, Layout, step_of
from ray_probe.watch.model_files import (
    ADAPTER_CONFIG,
    CONFIG,
    Kind,
    UnusableError,
    has_config,
    has_tokenizer,
    kind_of,
    missing_weights,
    read_object,
)

WITHOUT_CHANGE = "without a change"
"""In the reason of a checkpoint that waits for time to pass."""


def inspect(
    directory: Path, base: Path | None = None, earlier: Stamp | None = None, now: float = 0.0, step: int | None = None
) -> Found:
    """Judge a checkpoint directory.

    Args:
        directory: of the checkpoint.
        base: model whose config and tokenizer are taken where the checkpoint has none, and the base of adapters.
        earlier: stamp of the inspection before, or None.
        now: the caller's clock, seconds.
        step: of the trainer, where it is known; None: from the directory's name.
    """
    layout = LAYOUTS[-1]
    step = step_of(directory) if step is None else step
    try:
        if not directory.is_dir():
            return Found("vanished", layout.name, step, "it is not there any more")
        stamp = Stamp.of(directory, earlier, now)
        layout = next(layout for layout in LAYOUTS if layout.fits(directory))
        found = _judged(directory, layout, step, base, now - stamp.since)
        return replace(found, stamp=stamp)
    except UnusableError as error:
        return Found("skipped", layout.name, step, str(error))
    except OSError:  # files come and go between two looks
        if not directory.is_dir():
            return Found("vanished", layout.name, step, "it is not there any more")
        return Found("waiting", layout.name, step, "its files, which are being moved")


def _judged(directory: Path, layout: Layout, step: int | None, base: Path | None, quiet: float) -> Found:
    """Return the judgement on a directory whose files have stayed for `quiet` seconds."""
    found = Found("waiting", layout.name, step)
    if (why := layout.given_up(directory)) is not None:
        return replace(found, state="skipped", why=why)
    if (what := layout.unfinished(directory, step)) is not None:
        if not layout.may_lack_marker(directory) or _whole(directory, layout, found, base).state == "waiting":
            return replace(found, why=what)
        if quiet < PATIENT_S:
            return replace(found, why=f"{what}, or {PATIENT_S:.0f} s {WITHOUT_CHANGE}")
    present = _whole(directory, layout, found, base)
    if present.state == "waiting" or quiet >= layout.quiet_s:
        return present
    return replace(found, why=f"{layout.quiet_s:.0f} s {WITHOUT_CHANGE}")


def _whole(directory: Path, layout: Layout, found: Found, base: Path | None) -> Found:
    """Return the judgement on a directory that its trainer has finished."""
    places = [place for place in layout.models(directory) if place.is_dir()]
    kinds = {place: kind_of(place) for place in places}
    place = next((place for place in places if kinds[place] in ("model", "adapter")), None)
    if place is not None:
        return _loadable(place, kinds[place], directory, layout, found, base)
    if any(kind == "pickle" for kind in kinds.values()):
        pickled = "its weights are a pickle, which is never opened: save safetensors (safe_serialization)"
        return replace(found, state="skipped", why=pickled)
    if layout.convert is not None and layout.sharded(directory):
        return _sharded(directory, layout, found, base)
    if layout.advice:
        return replace(found, state="skipped", why=layout.advice)
    return replace(found, why="its weights" if places and has_config(places[0]) else CONFIG)


def _loadable(place: Path, kind: Kind, directory: Path, layout: Layout, found: Found, base: Path | None) -> Found:
    """Return the judgement on a directory that holds a model or an adapter."""
    if (what := missing_weights(place, kind)) is not None:
        return replace(found, why=what)
    if kind == "adapter":
        return _with_base(place, found, base)
    inside = [place, directory / layout.tokenizer] if layout.tokenizer else [place]
    others = [] if base is None else [base]
    config = next((path for path in [place, *others] if has_config(path)), None)
    tokenizer = next((path for path in [*inside, *others] if has_tokenizer(path)), None)
    if config is None or tokenizer is None:
        what = "config.json" if config is None else "a tokenizer"
        if layout.quiet_s:
            return replace(found, why=f"{what}, its own or that of --base DIR")
        # The marker says that the trainer has finished, so it will not come.
        return replace(found, state="skipped", why=f"it lacks {what}: give --base DIR")
    return replace(found, state="ready", model=Model(place, config, tokenizer))


def _with_base(place: Path, found: Found, base: Path | None) -> Found:
    """Return the judgement on a whole adapter: its base must be a directory."""
    if base is None:
        named = (read_object(place / ADAPTER_CONFIG) or {}).get("base_model_name_or_path")
        if not isinstance(named, str) or not named or not Path(named).is_dir():
            why = f"it is an adapter on {json.dumps(named)}, which is no directory here: give --base DIR"
            return replace(found, state="skipped", why=why)
        base = Path(named).resolve()
    return replace(found, state="ready", model=Model(base, base, base), adapter=place)


def _sharded(directory: Path, layout: Layout, found: Found, base: Path | None) -> Found:
    """Return the judgement on finished weights that transformers cannot load."""
    to = directory.with_name(directory.name + DESTINATION)
    if to.is_dir():
        return replace(found, state="skipped", why=f"it was converted, to {to.name}")
    assert layout.convert is not None
    command = layout.convert(directory, to, "BASE" if base is None else str(base))
    return replace(found, state="needs conversion", why=command, source=directory / layout.source)
