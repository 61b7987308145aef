"""Call a transformers model for its logits or hidden states only."""

import inspect
from functools import lru_cache
from typing import Any

_WANTED = {
    # A mixture of experts trained with its auxiliary loss would compute that loss, with the cache's mask.
    "output_router_logits": False,
    "output_attentions": False,
    "output_hidden_states": False,
    "return_dict": True,
}


def call_model(module: Any, **inputs: Any) -> Any:
    """Run a model, or the trunk of one; returns its output with named fields.

    Further outputs that its config.json turns on, such as router logits, are turned off.

    Args:
        module: a transformers model.
        inputs: of its `forward`.
    """
    return module(**inputs, **_turned_off(module))


def _turned_off(module: Any) -> dict[str, bool]:
    """Return the arguments that turn off further outputs of the module's config."""
    config = module.config.get_text_config()
    names = [name for name, wanted in _WANTED.items() if bool(getattr(config, name, wanted)) != wanted]
    return {name: _WANTED[name] for name in names if _takes(module.__class__, name)}


@lru_cache
def _takes(module_class: Any, name: str) -> bool:
    parameters = inspect.signature(module_class.forward).parameters.values()
    return any(one.name == name or one.kind is inspect.Parameter.VAR_KEYWORD for one in parameters)
