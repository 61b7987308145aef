"""What a comparison of two checkpoints can be combined with, and what needs one."""

from typing import TYPE_CHECKING

from ray_probe.config.field_types import refusal

if TYPE_CHECKING:
    from ray_probe.config.schema import ProbeConfig


def check_comparison(config: "ProbeConfig") -> None:
    """Refuse settings that a comparison, or a run without one, cannot have.

    Args:
        config: a whole run, with valid sections.

    Raises:
        PydanticCustomError: with the remedy, and `field` and `value` of the first such setting.
    """
    target, group, compare = config.batch.target_error, config.batch.responses_per_prompt, config.compare
    if compare.against is None:
        if compare.adapter is not None:
            raise refusal("need compare.against, its base model", field="compare.adapter", value=compare.adapter)
        if target is not None and target.of == "change":
            raise refusal("need compare.against", field="batch.target_error.of", value=target.of)
        if compare.parts:
            raise refusal("need compare.against", field="compare.parts", value=True)
        return
    if group < 4 or group % 2:
        remedy = "a comparison needs an even number, 4 or more: half of the responses come from each checkpoint"
        raise refusal(remedy, field="batch.responses_per_prompt", value=group)
    if target is not None and target.of == "gradient":
        raise refusal("a comparison takes no gradient: use change", field="batch.target_error.of", value=target.of)
    if config.estimator.x_estimator_mode != "rb_residual":
        remedy = "a comparison needs rb_residual, the exact entropy of each step"
        raise refusal(remedy, field="estimator.x_estimator_mode", value=config.estimator.x_estimator_mode)
    if config.output.save_gradient:
        raise refusal("a comparison takes no gradient: use false", field="output.save_gradient", value=True)
    if compare.parts and (adapter := compare.adapter or config.model.adapter) is not None:
        key = "model.adapter" if compare.adapter is None else "compare.adapter"
        remedy = f"parts need full weights, {key} is {adapter}; merge adapters into checkpoints, or set it to false"
        raise refusal(remedy, field="compare.parts", value=True)
