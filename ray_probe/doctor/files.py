"""Check the files of a run: checkpoint, prompts, run directory, room on the disk."""

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from ray_probe.checkpoints.headers import weight_headers
from ray_probe.checkpoints.memory_forecast import BUFFERS, WIDTH, GradientUse, estimate, size
from ray_probe.checkpoints.tokenizer.eos import KEY as EOS_KEY
from ray_probe.config.schema import CompareConfig
from ray_probe.data.prompts import load_prompts
from ray_probe.doctor.checks import Case, Finding
from ray_probe.errors import InputError, OutputError
from ray_probe.run.directory import RunDirectory

if TYPE_CHECKING:
    from ray_probe.checkpoints.inspection import Checkpoint

GRADIENT_BYTES = 16  # float64, the committed one and its successor
SAVED_BYTES = 8  # gradient.safetensors
OTHER_BYTES = 64 * 2**20  # records, rounds, plots, log


def checkpoint(case: Case) -> Finding:
    """Check that checkpoint and adapter are whole and finite, without loading them."""
    from ray_probe.checkpoints.inspection import inspect_checkpoint
    from ray_probe.run.preparation.prepare import prepare

    found = inspect_checkpoint(case.run.model)
    found.eos(case.run.generation.eos_token_ids)
    # Of a comparison, B and the prompts alone: what A adds has steps of its own.
    alone = case.run.model_copy(update={"compare": CompareConfig()})
    try:
        case.prepared = prepare(alone, checkpoint=found)
    except InputError as error:  # of the prompts, as the checkpoint has just passed
        case.unusable = error
    case.found = found
    return Finding(_contents(found))


def against(case: Case) -> Finding:
    """Check that A of a comparison is whole and finite, without loading it."""
    from ray_probe.run.comparison.same_tokens import inspect_against

    found = inspect_against(case.run)
    assert found is not None, "of a comparison"
    case.against = found
    return Finding(_contents(found))


def _contents(found: "Checkpoint") -> str:
    tensors = weight_headers(found.directory).values()
    adapter = f", adapter {found.adapter}" if found.adapter else ""
    if found.policy_tokenizer.tokenizer_from == "model.adapter":
        adapter += " with its own tokenizer"
    what = f"{sum(t.size for t in tensors):,} parameters, all finite, {size(sum(t.stored_bytes for t in tensors))}"
    return f"{found.directory}{adapter}: {what}, fingerprint {found.fingerprint[:12]}"


def end_of_response(case: Case) -> Finding:
    """Name the ids that end a response; a warning if sources differ."""
    return _ends(case, case.checkpoint)


def end_of_response_of_a(case: Case) -> Finding:
    """Name the ids that end a response of A; a warning if sources differ."""
    return _ends(case, case.policies[1])


def _ends(case: Case, found: "Checkpoint") -> Finding:
    eos = found.eos(case.run.generation.eos_token_ids)
    detail = f"responses end at {eos.line()}"
    if case.run.generation.eos_token_ids is not None or not eos.others:
        return Finding(detail)
    return Finding(f"{detail}, but {eos.differences()}", f"set {EOS_KEY}, which decides")


def same_tokens(case: Case) -> Finding:
    """Check that A and B have the same tokens, ends of responses and prompts."""
    from ray_probe.run.preparation.prepare import prepare

    case.prepared = prepare(case.run, checkpoint=case.checkpoint, against=case.against)
    also = " and architecture" if case.run.compare.parts else ""
    count = case.prepared.prompts.count
    return Finding(f"both checkpoints have the same token ids, ends of responses, {count} rendered prompts{also}")


def prompts(case: Case) -> Finding:
    """Check that the prompts can be read and fit the model."""
    if case.unusable is not None:
        raise case.unusable
    if case.prepared is None:
        data = case.run.data
        render = (lambda prompt, where: str(prompt)) if data.chat_template else None  # stands in for the template
        read = load_prompts(data.prompts, data.field, render, case.run.model.local_files_only, data.id_field)
        return Finding(f"{read.source}: {len(read)} prompts, of unknown length without the checkpoint")
    found, plan = case.prepared.prompts, case.prepared.plan
    case.longest = found.longest_tokens
    left_out = f", {found.skipped_as_too_long} skipped as too long" if found.skipped_as_too_long else ""
    rounds = "rounds without end" if plan.round_count is None else f"{plan.round_count} rounds"
    usable = f"{found.count} prompts of at most {case.longest} tokens{left_out}"
    return Finding(f"{found.source}: {usable}, for {rounds} of {plan.prompts_per_round}")


def no_run(case: Case) -> Finding:
    """Name the checks that need a config."""
    what = "checkpoint, prompts, memory and run directory"
    return Finding(f"not looked at: {what} of a run", "give its CONFIG", looked=False)


def run_directory(case: Case) -> Finding:
    """Check that the run directory can be made here."""
    output = case.run.output
    parent = Path(output.dir).resolve()
    RunDirectory.check_free(parent, output.name or "-")
    return Finding(f"{parent / output.name if output.name else parent} can be written")


def disk(case: Case) -> Finding:
    """Check that the disk has room for the files of a run."""
    output, found = case.run.output, case.checkpoint
    use: GradientUse = "summed" if case.run.compare.against is None else "none"
    demand = estimate(case.run, found.directory, found.config, 1, found.adapter, use)
    trainable = demand.gradients // (BUFFERS * max(4, WIDTH[case.run.model.dtype]))
    needed = trainable * (GRADIENT_BYTES + (SAVED_BYTES if output.save_gradient else 0)) + OTHER_BYTES
    there = nearest(Path(output.dir).resolve())
    free = shutil.disk_usage(there).free
    detail = f"{size(free)} free at {there}, about {size(needed)} needed"
    if free < needed:
        raise OutputError(f"output.dir: {detail}; make room, or choose another directory")
    return Finding(detail)


def nearest(path: Path) -> Path:
    """Return the path itself, or its nearest parent that exists."""
    return next(place for place in (path, *path.parents) if place.exists())
