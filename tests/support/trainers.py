"""Scripts of trainers that write a checkpoint, write by write, as the real ones do.

A script is a list of phases. Within a phase the trainer's order is free, as ranks write side by side; a phase ends
before the next one begins.
"""

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
from safetensors.numpy import save

How = Literal["in place", "renamed", "at once"]
Step = Callable[[Path], None]


@dataclass(frozen=True)
class Write:
    """One file, or an action on the directory tree.

    Attributes:
        path: below the watched directory.
        data: content of the file.
        how: in place (a first half, then the rest), renamed from a temporary name, or at once.
        temporary: name that a renamed file has first; empty: one as safetensors makes it.
        act: in the place of a write.
    """

    path: str
    data: bytes = b""
    how: How = "in place"
    temporary: str = ""
    act: Step | None = None

    def steps(self) -> Iterator[Step]:
        """Yield what happens to the disk, one change at a time."""
        if self.act is not None:
            yield self.act
            return
        if self.how == "renamed":
            first = str(Path(self.path).with_name(self.temporary or f".tmp{abs(hash(self.path)) % 10**6:06d}"))
            yield from (_put(first, self.data[: len(self.data) // 2]), _put(first, self.data))
            yield lambda root: (root / first).replace(root / self.path) and None
            return
        if self.how == "in place":
            yield _put(self.path, b"")
            yield _put(self.path, self.data[: len(self.data) // 2])
        yield _put(self.path, self.data)


@dataclass(frozen=True)
class Script:
    """How a trainer writes one checkpoint.

    Attributes:
        layout: name that the watcher gives it.
        directory: of the checkpoint, below the watched directory.
        phases: what is written, in order.
        end: state of the finished checkpoint.
        why: part of the reason in that state.
        done: number of phases after which the checkpoint is finished; what follows does not matter to it.
        model: directory of the weights, below `directory`; of an adapter, its own.
        adapter: the weights are an adapter's.
        needs_base: config and tokenizer come from the base model.
        quiet: it has no marker, so that its files must stay as they are for a while.
    """

    layout: str
    directory: str
    phases: Sequence[Sequence[Write]]
    end: Literal["ready", "needs conversion", "skipped"] = "ready"
    why: str = ""
    done: int = 0
    model: str = ""
    adapter: bool = False
    needs_base: bool = False
    quiet: bool = False
    step: int = field(default=5)

    @property
    def finished(self) -> int:
        """Number of phases after which the checkpoint is finished."""
        return self.done or len(self.phases)


def tensors(elements: int = 6) -> bytes:
    """Return the bytes of a tiny safetensors file."""
    return save({"w": np.arange(elements, dtype=np.float32), "b": np.ones(2, dtype=np.float16)})


def as_json(value: object) -> bytes:
    return json.dumps(value).encode()


def index(*names: str) -> bytes:
    return as_json({"metadata": {}, "weight_map": {f"layer.{k}": name for k, name in enumerate(names)}})


CONFIG = as_json({"model_type": "llama", "architectures": ["LlamaForCausalLM"]})
TOKENIZER = as_json({"model": {"type": "BPE", "vocab": {"a": 0}}})


def under(directory: str, **files: bytes) -> list[Write]:
    """Return writes of files below a directory; `__` in a name is a dot."""
    return [Write(f"{directory}/{name.replace('__', '.')}", data) for name, data in files.items()]


def config(directory: str) -> list[Write]:
    return under(directory, config__json=CONFIG, generation_config__json=as_json({"eos_token_id": 1}))


def tokenizer(directory: str) -> list[Write]:
    return under(directory, tokenizer_config__json=as_json({}), tokenizer__json=TOKENIZER)


def weights(directory: str, shards: int = 1, how: How = "renamed") -> list[list[Write]]:
    """Return the phases of weights as save_pretrained writes them: the index last."""
    if shards == 1:
        return [[Write(f"{directory}/model.safetensors", tensors(), how)]]
    names = [f"model-{k + 1:05d}-of-{shards:05d}.safetensors" for k in range(shards)]
    return [[Write(f"{directory}/{name}", tensors(4 + k), how) for k, name in enumerate(names)],
            [Write(f"{directory}/model.safetensors.index.json", index(*names))]]  # fmt: skip


def adapter(directory: str, base: str) -> list[list[Write]]:
    settings = as_json({"base_model_name_or_path": base, "peft_type": "LORA"})
    return [[Write(f"{directory}/adapter_model.safetensors", tensors(), "renamed")],
            under(directory, adapter_config__json=settings)]  # fmt: skip


def states(directory: str) -> list[Write]:
    """Return the states to resume from that transformers' Trainer writes beside the model."""
    return under(directory, optimizer__pt=b"pickled" * 9, scheduler__pt=b"pickled", rng_state_0__pth=b"p",
                 rng_state_1__pth=b"p")  # fmt: skip


def moved(source: str, target: str) -> Write:
    return Write(target, act=lambda root: (root / source).rename(root / target) and None)


def removed(path: str) -> Write:
    def remove(root: Path) -> None:
        place = root / path
        shutil.rmtree(place) if place.is_dir() else place.unlink()

    return Write(path, act=remove)


def _put(path: str, data: bytes) -> Step:
    def put(root: Path) -> None:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(data)

    return put
