"""Time that a trainer's callback takes at a save, against linking the same files.

The checkpoint has ten files of 100 MB without content: the callback reads and writes none of it.
"""

import itertools
import os
import statistics
import tempfile
from pathlib import Path
from types import SimpleNamespace

from benchmarks.measure import interleaved, ratio, shown
from benchmarks.saving import save
from ray_probe.integrations import ProbeCallback

FILES, FILE_BYTES = 10, 100_000_000
SAVES = 200
BOUND_MS = 50.0
STEP = 120


def _checkpoint(directory: Path) -> list[Path]:
    """Write the files of a model, and of an optimizer that is not linked."""
    directory.mkdir(parents=True)
    weights = [directory / f"model-{number:05d}-of-{FILES:05d}.safetensors" for number in range(1, FILES + 1)]
    for path in [*weights, directory / "optimizer.pt"]:
        with path.open("wb") as stream:
            stream.truncate(FILE_BYTES)
    small = [directory / name for name in ("config.json", "tokenizer.json", "trainer_state.json")]
    for path in small:
        path.write_text("{}")
    return weights + small


def main() -> None:
    """Measure on the disk of the temporary directory, print, save."""
    with tempfile.TemporaryDirectory() as name:
        output = Path(name)
        files = _checkpoint(output / f"checkpoint-{STEP}")
        callback, numbers = ProbeCallback(), itertools.count()
        arguments = SimpleNamespace(output_dir=name)
        state = SimpleNamespace(is_world_process_zero=True, global_step=STEP)

        def hand_over() -> None:
            callback.on_save(arguments, state, None)

        def link() -> None:
            place = output / "links" / str(next(numbers))
            place.mkdir(parents=True)
            for file in files:
                os.link(file, place / file.name)

        seconds = interleaved({"callback": hand_over, "links": link}, SAVES, "cpu")
        spool = output / ".ray_probe"
        assert len(list(spool.glob("*.json"))) == len(list((spool / "pins").iterdir())) == SAVES + 1
    ordered = sorted(1e3 * value for value in seconds["callback"])
    figures = {"median_ms": statistics.median(ordered), "p99_ms": ordered[int(0.99 * SAVES)], "max_ms": ordered[-1]}
    over = ratio(seconds["callback"], seconds["links"])
    cells = "  ".join(f"{key} {value:.2f}" for key, value in figures.items())
    print(f"  {FILES} files of {FILE_BYTES / 1e6:.0f} MB, a save: {cells}   (at most {BOUND_MS:.0f} ms is the target)")
    print(f"  over linking the same files: x{shown(over)}")
    save(
        "callback_cost",
        {"files": FILES, "file_bytes": FILE_BYTES, "saves": SAVES, "callback": figures, "over_links": over},
    )


if __name__ == "__main__":
    main()
