"""At every step of every trainer's writing the watcher says the right thing, whatever the order of the writes."""

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.trainer_scripts import SCRIPTS
from support.trainers import Script, Step, Write, config, tensors, tokenizer

from ray_probe.watch.candidates import checkpoints
from ray_probe.watch.found import Found
from ray_probe.watch.inspection import inspect
from ray_probe.watch.layouts import LAYOUTS, QUIET_S

LONG_S, SHORT_S = QUIET_S + 1.0, QUIET_S / 3
Choose = Callable[[int], int]


class Looks:
    """A watcher's looks at a directory in which checkpoints appear."""

    def __init__(self, root: Path, base: Path | None) -> None:
        self.root, self.base, self.now = root, base, 0.0
        self._last: dict[str, Found] = {}

    def look(self, key: str, later_s: float = 0.0) -> Found | None:
        """Returns what is said of a checkpoint after a pause; None: it is not listed."""
        self.now += later_s
        listed = {candidate.key: candidate for candidate in checkpoints(self.root)}
        if key not in listed:
            return None
        before = self._last.get(key)
        found = self._last[key] = inspect(listed[key].path, self.base, before and before.stamp, self.now)
        return found


def written(write: Write, root: Path) -> None:
    for step in write.steps():
        step(root)


def base_model(directory: Path) -> Path:
    for write in [*config("base"), *tokenizer("base"), Write("base/model.safetensors", tensors())]:
        written(write, directory)
    return directory / "base"


def interleaved(phase: Sequence[Write], choose: Choose) -> list[Step]:
    """Returns the steps of a phase's writes in an order that the trainer may take."""
    queues, steps = [list(write.steps()) for write in phase], []
    while queues := [queue for queue in queues if queue]:
        steps.append(queues[choose(len(queues))].pop(0))
    return steps


def check(script: Script, directory: Path, choose: Choose) -> None:
    """Perform a script, and look at the directory after each change of the disk."""
    root = directory / "out"
    root.mkdir()
    looks = Looks(root, base_model(directory) if script.needs_base or script.adapter else None)
    key = str(root.resolve() / script.directory)
    before = [step for phase in script.phases[: script.finished] for step in interleaved(phase, choose)]
    after = [step for phase in script.phases[script.finished :] for step in interleaved(phase, choose)]
    # A trainer with a marker may pause as long as it likes; without one it is finished when it pauses for long.
    pause_s = SHORT_S if script.quiet else LONG_S
    for step in before[:-1]:
        step(root)
        for found in [looks.look(key), looks.look(key, pause_s), looks.look(key, pause_s / 2)]:
            assert found is None or found.state == "waiting" or found.state == script.end == "skipped", found
            assert found is None or found.why
    for step in [before[-1], *after]:
        step(root)
        found = looks.look(key)
        if script.quiet:
            assert found is not None and found.state in ("waiting", "skipped"), found
            found = looks.look(key, LONG_S)
        assert found is not None and (found.state, found.layout) == (script.end, script.layout), found
        assert found.step == script.step and script.why in found.why
    assert found is not None
    if script.end == "ready":
        place = root.resolve() / script.directory / script.model
        assert found.model is not None and (found.adapter or found.model.weights) == place
        assert (found.model.config == looks.base) == (script.needs_base or script.adapter)
    elif script.end == "needs conversion":
        assert found.source is not None and found.source.is_dir() and str(root) in found.why


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_checkpoint_is_ready_after_its_last_write_and_never_before(name: str, tmp_path: Path) -> None:
    check(SCRIPTS[name], tmp_path, lambda choices: 0)


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_the_order_of_writes_that_a_trainer_may_choose_does_not_matter(data: st.DataObject) -> None:
    script = SCRIPTS[data.draw(st.sampled_from(sorted(SCRIPTS)))]
    with tempfile.TemporaryDirectory() as directory:
        check(script, Path(directory), lambda choices: data.draw(st.integers(0, choices - 1)))


def test_every_layout_of_the_table_has_a_script() -> None:
    assert {script.layout for script in SCRIPTS.values()} == {layout.name for layout in LAYOUTS}
