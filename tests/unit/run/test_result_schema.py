"""The schema of result.json is generated from the types, and every result that the tests know validates against it."""

import json
from dataclasses import fields
from importlib import resources
from pathlib import Path
from typing import Any, get_args

import jsonschema
import pytest
from support.results import a_result
from support.runs import Job, a_checkpoint, settings

from ray_probe.checkpoints.tokenizer.eos import Eos
from ray_probe.config.schema import BaselineConfig
from ray_probe.core.estimator.modes import Fit, Mode
from ray_probe.run.directory import as_json
from ray_probe.run.result import Result
from ray_probe.system.json_object import JsonObject, json_schema

SHIPPED = resources.files("ray_probe.run") / "result.schema.json"
EOS = {"ids": [0], "source": "config.json", "others": {"generation_config.json": [2]}, "texts": {"0": "<eos>"}}


def of_0_1_1() -> dict[str, Any]:
    """What ray_probe 0.1.1 wrote: another name of the norm, a key that is gone, no `eos`."""
    result = a_result()
    gradient = {"norm": 3.214, "cos_pathwise": None}
    result["gradient"] = gradient | {key: result["gradient"][key] for key in ("norm_sq_debiased", "trace_cov", "snr")}
    del result["stopped_by"]
    return result


def test_the_shipped_schema_is_the_one_of_the_types() -> None:
    """Where the types have changed: python -m ray_probe.run.result > ray_probe/run/result.schema.json."""
    assert SHIPPED.read_text() == as_json(json_schema(Result))


def test_the_schema_is_a_schema_in_which_every_figure_says_what_it_is() -> None:
    schema = json.loads(SHIPPED.read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    for part in (schema, *schema["$defs"].values()):
        assert part["description"]
        assert all("description" in figure for figure in part["properties"].values())


@pytest.mark.parametrize("changes", [{}, {"partial": ["0/3"]}, {"conflicts": ["0/3"]}, {"eos": EOS}])
def test_a_written_result_validates_and_reads_back(changes: dict[str, Any]) -> None:
    result = Result.from_json(a_result() | changes)
    jsonschema.validate(result.to_json(), json.loads(SHIPPED.read_text()))
    assert result.to_json() == a_result() | changes
    assert Result.from_json(json.loads(as_json(result.to_json()))) == result


def test_the_result_of_a_run_validates(tmp_path: Path) -> None:
    job = Job.of(settings(a_checkpoint(tmp_path)), tmp_path / "run")
    written = job.run()
    jsonschema.validate(json.loads((job.path / "result.json").read_text()), json.loads(SHIPPED.read_text()))
    assert Result.from_json(written).to_json() == written


@pytest.mark.parametrize(
    ("path", "value"),
    [("schema_version", None), ("counts.tokens", 1.5), ("counts.tokens", None), ("entropy.per_token", "1"),
     ("advantage_mean_square.other", 1.0), ("partial", True), ("beta.features", None)],
)  # fmt: skip
def test_another_type_does_not_validate(path: str, value: object) -> None:
    result = a_result()
    *sections, last = path.split(".")
    part = result[sections[0]] if sections else result
    part[last] = value
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(result, json.loads(SHIPPED.read_text()))


def test_a_result_of_0_1_1_is_read() -> None:
    result = Result.from_json(of_0_1_1())
    assert (result.gradient.snr, result.gradient.norm_raw, result.eos) == (3.37, None, None)
    assert result.to_json() | {"gradient": None} == a_result() | {"gradient": None, "stopped_by": None}


def test_a_key_of_another_type_is_refused_in_one_line_that_names_it() -> None:
    for raw, words in (
        ({"counts": {"tokens": "many"}}, "counts.tokens: "),
        ({"eos": {"ids": [1]}}, "eos: has no 'source'"),
        ([1], "should be a dictionary"),
    ):
        with pytest.raises(ValueError, match=words) as refused:
            Result.from_json(raw)
        assert "\n" not in str(refused.value)


def test_types_are_frozen_and_keys_are_fields() -> None:
    assert {field.name for field in fields(Eos)} == set(Eos((0,), "x").to_json())
    assert issubclass(Result, JsonObject)
    with pytest.raises(AttributeError):
        Result().counts = None  # type: ignore[misc,assignment]


def test_the_configuration_and_the_estimator_name_the_same_baselines_and_fits() -> None:
    for name, known in (("mode", Mode), ("fit", Fit)):
        assert get_args(BaselineConfig.model_fields[name].annotation) == get_args(known)
