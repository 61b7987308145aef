"""Trainers reduced to what they call of a callback, with the events and arguments that they document."""

import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from transformers import Trainer

WEIGHTS = b"weights of step %d"


def write_model(directory: Path, step: int) -> None:
    """Write the files of a model; their content tells the step."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text("{}")
    (directory / "model.safetensors").write_bytes(WEIGHTS % step)


class GRPOTrainer(Trainer):
    """TRL's trainer without rewards and sampling: it trains on what it is given, and saves as TRL does."""

    def __init__(self, model: Any, reward_funcs: Any, **others: Any) -> None:
        super().__init__(model, **others)


class RayPPOTrainer:
    """SkyRL's trainer: `on_save` comes before the export of its step, `on_log` after it."""

    def __init__(self, cfg: Any, tracker: Any, callbacks: list[Any] | None = None) -> None:
        self.cfg, self.callbacks = cfg, list(callbacks or [])

    def train(self) -> None:
        exports, steps = Path(self.cfg.trainer.export_path), self.cfg.steps
        self._fire("on_train_start", 0)
        for step in range(1, steps + 1):
            self._fire("on_step_start", step)
            self._fire("on_step_end", step, metrics={})
            self._fire("on_save", step, ckpt_path=str(exports.parent / f"global_step_{step}"))
            if step % self.cfg.trainer.hf_save_interval == 0:
                write_model(exports / f"global_step_{step}" / "policy", step)
            self._fire("on_log", step, logs={})
        if steps % self.cfg.trainer.hf_save_interval:
            write_model(exports / f"global_step_{steps}" / "policy", steps)
        self._fire("on_train_end", steps)

    def _fire(self, event: str, step: int, **fields: Any) -> None:
        given = SimpleNamespace(**{"batch": None, "metrics": None, "logs": None, "ckpt_path": None, **fields})
        given.global_step = step
        for callback in self.callbacks:
            getattr(callback, event)(self, given, SimpleNamespace(should_save=False, should_evaluate=False))


class BasePPOExp:
    """SkyRL's experiment, which asks for its trainer by keywords."""

    def __init__(self, cfg: Any) -> None:
        self.cfg = cfg

    def get_trainer(self, cfg: Any, tracker: Any) -> RayPPOTrainer:
        return RayPPOTrainer(cfg=cfg, tracker=tracker)

    def run(self) -> None:
        self.get_trainer(cfg=self.cfg, tracker=None).train()


def verl(class_name: str | type, output: Path, steps: int, inside: str) -> None:
    """Save as verl does: the named class is made of the configuration, and called by keywords."""
    module, _, name = class_name.rpartition(".") if isinstance(class_name, str) else ("", "", "")
    made = getattr(import_module(module), name) if isinstance(class_name, str) else class_name
    callback = made(config=SimpleNamespace(trainer=SimpleNamespace(default_local_dir=str(output))))
    for step in range(1, steps + 1):
        directory = output / f"global_step_{step}"
        write_model(directory / "actor" / inside, step)
        callback.on_save(trainer=object(), global_step=step, checkpoint_dir=str(directory), async_save=False)


def importable(patch: pytest.MonkeyPatch, dotted: str, **contents: Any) -> None:
    """Have a module with these contents importable, by its dotted name."""
    names = dotted.split(".")
    for end in range(1, len(names) + 1):
        module = ModuleType(".".join(names[:end]))
        module.__path__ = []
        patch.setitem(sys.modules, module.__name__, module)
    vars(module).update(contents)
