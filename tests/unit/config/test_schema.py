import json
import math
import pickle
from copy import deepcopy

import pytest
from pydantic import BaseModel, ValidationError

from ray_probe.config.loading import config_from_dict, dump_yaml, load_config, to_dict
from ray_probe.config.schema import ProbeConfig
from ray_probe.core.columns import COLUMNS, LOGIT_COLUMNS
from ray_probe.errors import ConfigError

MINIMAL = {"model": {"path": "m"}, "data": {"prompts": "p.jsonl"}}


def with_value(dotted: str, value: object) -> dict:
    raw: dict = deepcopy(MINIMAL)
    *sections, key = dotted.split(".")
    inner = raw
    for section in sections:
        inner = inner.setdefault(section, {})
    inner[key] = value
    return raw


def value_at(config: ProbeConfig, dotted: str) -> object:
    value: object = config
    for part in dotted.split("."):
        value = getattr(value, part)
    return value


def refusal(raw: dict) -> str:
    with pytest.raises(ConfigError) as caught:
        config_from_dict(raw)
    message = str(caught.value)
    assert len(message.splitlines()) == 1, message
    return message


def fields(model: type[BaseModel] = ProbeConfig, prefix: str = "") -> dict:
    """Every field by dotted path, sections included."""
    found = {}
    for name, info in model.model_fields.items():
        found[prefix + name] = info
        if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
            found |= fields(info.annotation, f"{prefix}{name}.")
    return found


COUNTS = [
    "batch.prompts_per_round", "batch.responses_per_prompt", "batch.shard_prompts", "output.commit_rounds",
    "generation.max_new_tokens", "generation.gen_batch_size", "generation.tf_batch_size",
    "cluster.actors", "cluster.max_actors", "cluster.cpus_per_actor",
]  # fmt: skip
FLAGS = ["model.local_files_only", "data.repeat", "data.chat_template", "generation.rb_requires_grad",
         "output.save_gradient"]  # fmt: skip
TEXTS = ["model.path", "data.field", "cluster.namespace", "output.dir"]
NUMBERS = {
    "generation.temperature": ("need a finite number > 0", [0, -1.0]),
    "generation.top_p": ("need a number > 0 and <= 1", [0, -0.1, 1.0001, 2]),
    "generation.parity_tolerance": ("need null or a finite number > 0", [0, -1e-3]),
    "estimator.baseline.ridge_lambda": ("need a finite number > 0", [0, -1e-3]),
    "estimator.baseline.ema_decay": ("need a number >= 0 and < 1", [-0.1, 1, 1.5]),
    "cluster.gpus_per_actor": ("need a finite number >= 0", [-1, -0.5]),
}
ENUMS = {
    "model.dtype": "need 'float32', 'bfloat16' or 'float64'",
    "data.on_long": "need 'error' or 'skip'",
    "estimator.x_estimator_mode": "need 'rb_residual' or 'naive'",
    "estimator.baseline.mode": "need 'none', 'constant', 'residual_mu' or 'regression'",
    "estimator.baseline.fit": "need 'leave_one_out', 'in_sample' or 'lagged'",
}
NOT_NUMBERS = [True, "1", "1e-3", math.nan, math.inf, -math.inf, 10**400, [1], {}]
REFUSED = [
    *[(name, bad, "need an integer >= 1") for name in COUNTS for bad in (0, -1, 1.0, True, "2", None, 2**31, math.nan)],
    *[(name, bad, remedy) for name, (remedy, bads) in NUMBERS.items() for bad in [*bads, *NOT_NUMBERS]],
    *[(name, bad, remedy) for name, remedy in ENUMS.items() for bad in ("nonsense", "", None, 1, True, [])],
    *[(name, bad, "need true or false") for name in FLAGS for bad in (0, 1, "true", None)],
    *[(name, bad, "need a string that is not blank") for name in TEXTS for bad in ("", " \n", 7, None, True, "a\0b")],
    *[("model.revision", bad, "need null or a string that is not blank") for bad in ("", 1e10, 7)],
    *[(name, bad, "need null or a string that is not blank") for name in ("model.adapter", "model.cache_dir")
      for bad in ("", 7, True)],
    ("model.trainable", "layers.(0", "need all, adapter, or a regular expression over parameter names (missing )"),
    ("model.trainable", "", "need a string that is not blank"),
    *[("data.prompts", bad, "need the path of a JSONL or parquet file, a data set, or a list")
      for bad in ([], "", 7, None, ["a", 7], {})],
    *[(name, bad, "need null or an integer >= 1") for bad in (0, -5, True, "9", 1.5)
      for name in ("data.max_prompt_tokens", "data.context_length", "batch.rounds", "batch.max_sequences")],
    *[("batch.max_seconds", bad, "need null or a finite number > 0") for bad in (0, -1.0, "9", math.inf)],
    ("batch.rounds", None, "need a number of rounds, batch.max_sequences or batch.max_seconds"),
    ("batch.max_sequences", 127, "need at least 128, one round"),
    *[("series.name", bad, "need null or 1 to 63 of a-z, 0-9, _ and -") for bad in ("", "A b", 7)],
    *[("series.step", bad, "need null or an integer >= 0") for bad in (-1, "5", 1.0, True)],
    ("metrics.tensorboard", 7, "need null or a string that is not blank"),
    *[("notify.command", bad, "need null or a program with its arguments") for bad in ("", " ", "a 'b", 7)],
    *[("notify.webhook", bad, "need null or an address http://... or https://...")
      for bad in ("", "x", "ftp://h/x", "http://", "http://h:99999/", "file:///etc/passwd", 7)],
    *[("series.tags", bad, "need a mapping from names to texts") for bad in (["a"], {"a": 1}, {"": "b"})],
    *[("data.seed", bad, "need an integer >= 0") for bad in (-1, 2**63, 1.0, "0", True, None)],
    *[("generation.eos_token_ids", bad, "need null or a list of distinct token ids >= 0")
      for bad in (2, [-1], [1, 1], ["</s>"], [True], [1.0])],
    *[("estimator.baseline.features", bad, "need recommended, logits, or a list of at least one feature name")
      for bad in ([], "H", "Logits", ["H", 1], None, 7)],
    ("estimator.baseline.features", ["H", "H"], "the feature 'H' is repeated"),
    ("estimator.baseline.features", ["entropi"], f"unknown feature 'entropi', known: {', '.join(COLUMNS)}"),
    ("estimator.baseline.features", ["H", "logitvar"], "did you mean 'logit_var'?"),
    ("estimator.baseline.features", ["h"], "did you mean 'H'?"),
    *[("cluster.address", bad, "need null (start Ray here), auto, or host:port with a port from 1 to 65535")
      for bad in ("", "local", "host", "host:0", "host:65536", "host:x", ":6379", "ray://h:1", "h:1\n", "::1:63", 7)],
    *[("cluster.resources", bad, "need a mapping from resource names to finite numbers >= 0")
      for bad in ({"a": -1}, {"a": "1"}, {"a": True}, {"a": math.inf}, {"": 1}, [], None)],
    ("cluster.resources", {"GPU": 1}, "set cluster.gpus_per_actor"),
    ("cluster.runtime_env", {"env_vars": {"RAY_PROBE_FAILPOINTS": "/x"}}, "leave out env_vars.RAY_PROBE_FAILPOINTS: "),
    *[("cluster.runtime_env", bad, "need a mapping with string keys and plain, finite values")
      for bad in ({"a": math.nan}, {"a": [{"b": math.inf}]}, {1: 2}, {"a": object}, [], None)],
    *[("output.name", bad, "need null or 1 to 63 of a-z, 0-9, _ and -")
      for bad in ("a/b", "..", "a\0", "~", "~root", "a" * 64, "a\u202eb", "", "A", "-a", "a\n", "a b", 7)],
]  # fmt: skip


@pytest.mark.parametrize(("dotted", "bad", "remedy"), REFUSED, ids=[f"{d}={b!r:.20}" for d, b, _ in REFUSED])
def test_a_bad_value_is_refused_by_field_value_and_remedy(dotted, bad, remedy):
    message = refusal(with_value(dotted, bad))
    assert message.startswith(f"{dotted}: got {repr(bad)[:60]}")
    assert remedy in message


ACCEPTED = [
    *[(name, good) for name in COUNTS for good in (1, 2**31 - 1)],
    *[("generation.temperature", good) for good in (1e-3, 2, 0.7)],
    *[("generation.top_p", good) for good in (1, 1.0, 1e-6)],
    *[("estimator.baseline.ema_decay", good) for good in (0, 0.999)],
    *[("cluster.gpus_per_actor", good) for good in (0, 0.25, 1, 2)],
    *[("data.seed", good) for good in (0, 2**63 - 1)],
    *[("model.trainable", good) for good in ("all", r".*\.mlp\..*", "^(q|k)_proj")],
    *[("cluster.address", good) for good in (None, "auto", "10.0.0.5:6379", "head.svc:1", "[::1]:65535", "a_b:6379")],
    *[("output.name", good) for good in (None, "a", "0", "run-1_b", "a" * 63)],
    *[("data.max_prompt_tokens", good) for good in (None, 1)],
    *[("series.name", good) for good in (None, "grpo-1")],
    *[("series.step", good) for good in (None, 0, 2**63 - 1)],
    *[("notify.command", good) for good in (None, "mail -s 'it is done' me", "sh -c 'cat > x'")],
    *[("notify.webhook", good) for good in (None, "http://127.0.0.1:8000/x", "https://hooks.example/a?b=c")],
    *[("series.tags", good) for good in ({}, {"arm": "clip high"})],
    *[("data.context_length", good) for good in (None, 1)],
    ("generation.parity_tolerance", 1e-3),
    ("cluster.resources", {"accelerator_type:H100": 0.001, "TPU": 4}),
    ("cluster.runtime_env", {"env_vars": {"A": "1"}, "pip": ["x"], "n": None, "f": 1.5}),
]


@pytest.mark.parametrize(("dotted", "good"), ACCEPTED, ids=[f"{d}={g!r:.20}" for d, g in ACCEPTED])
def test_a_good_value_is_kept(dotted, good):
    assert value_at(config_from_dict(with_value(dotted, good)), dotted) == good


@pytest.mark.parametrize(("dotted", "good"), [
    ("data.prompts", ["a", "b"]),
    ("generation.eos_token_ids", []),
    ("generation.eos_token_ids", [0, 2]),
    ("estimator.baseline.features", ["top1", "H"]),
])  # fmt: skip
def test_a_list_is_kept_in_order_and_cannot_be_changed(dotted, good):
    assert value_at(config_from_dict(with_value(dotted, good)), dotted) == tuple(good)


UNKNOWN = {
    "batch.shard_sise": "did you mean 'batch.shard_prompts'?",
    "modle": "did you mean 'model'?",
    "generation.Temperature": "did you mean 'generation.temperature'?",
    "estimator.baseline.ridge_lamda": "did you mean 'estimator.baseline.ridge_lambda'?",
    "batch.zzz": "known keys: prompts_per_round, responses_per_prompt, shard_prompts, rounds, "
    "max_sequences, max_seconds, target_error",
    "estimator.zzz": "known keys: x_estimator_mode, pass, memory_budget_gb, activation_checkpointing, baseline",
}


@pytest.mark.parametrize(("dotted", "remedy"), UNKNOWN.items(), ids=UNKNOWN)
def test_an_unknown_key_is_refused_with_its_full_path_and_what_was_meant(tmp_path, dotted, remedy):
    assert refusal(with_value(dotted, 1)) == f"config: unknown key {dotted!r}; {remedy}"
    path = tmp_path / "run.yaml"
    path.write_text("{model: {path: m}, data: {prompts: p.jsonl}}")
    with pytest.raises(ConfigError) as caught:
        load_config(path, [f"{dotted}=1"])
    assert str(caught.value) == f"config: unknown key {dotted!r}; {remedy}"


def test_odd_keys_and_mappings_are_refused_in_one_line():
    assert refusal({**MINIMAL, 7: 1}).startswith("config: unknown key '7'; known keys: model, data, batch")
    assert refusal({**MINIMAL, "a\nb": 1}).startswith("config: unknown key 'a\\nb'; ")
    assert len(refusal({**MINIMAL, "x" * 9999: 1})) < 300
    with pytest.raises(ConfigError, match=r"^here: got \[\]; need a mapping with keys from model, data"):
        config_from_dict([], "here")  # type: ignore[arg-type]


@pytest.mark.parametrize("section", ["batch", "generation", "estimator", "estimator.baseline", "cluster", "output"])
@pytest.mark.parametrize("bad", [None, [], "x", 3], ids=repr)
def test_a_section_that_is_no_mapping_is_refused(section, bad):
    assert refusal(with_value(section, bad)).startswith(f"{section}: got {bad!r}; need a mapping with keys from ")


def test_a_missing_required_field_is_named_in_full():
    assert refusal({"data": {"prompts": "p"}}).startswith("model.path: missing; need checkpoint directory")
    assert refusal({"model": {"path": "m"}}).startswith("data.prompts: missing; need path of a JSONL or parquet file")


def test_of_several_errors_the_unknown_key_comes_first_and_the_rest_are_counted():
    raw = {**MINIMAL, "batch": {"rounds": -1}, "generation": {"top_p": 2, "topp": 1}}
    assert refusal(raw) == "config: unknown key 'generation.topp'; did you mean 'generation.top_p'? (and 2 more)"


def test_the_defaults_are_those_of_the_specification():
    config = config_from_dict(MINIMAL)
    assert to_dict(config) == {
        "model": {"path": "m", "revision": None, "local_files_only": True, "adapter": None, "dtype": "float32",
                  "trainable": "all", "cache_dir": None, "snapshot": None},
        "data": {"prompts": "p.jsonl", "field": "prompt", "id_field": "id", "chat_template": False,
                 "max_prompt_tokens": None, "context_length": None, "on_long": "error", "repeat": True, "seed": 0},
        "batch": {"prompts_per_round": 32, "responses_per_prompt": 4, "shard_prompts": 4, "rounds": 4,
                  "max_sequences": None, "max_seconds": None, "target_error": None},
        "generation": {"temperature": 1.0, "top_p": 0.95, "max_new_tokens": 64, "eos_token_ids": None,
                       "gen_batch_size": 32, "tf_batch_size": 8, "tf_batch_tokens": 16384,
                       "rb_requires_grad": True, "parity_tolerance": None},
        "estimator": {"x_estimator_mode": "rb_residual", "pass": "auto", "memory_budget_gb": None,
                      "activation_checkpointing": False, "baseline": {
            "mode": "regression", "fit": "leave_one_out", "ridge_lambda": 1e-3, "features": "recommended",
            "ema_decay": 0.9}},
        "compare": {"against": None, "adapter": None, "side": 0, "keep_responses": False, "responses_from": None,
                    "parts": False},
        "series": {"name": None, "step": None, "tags": {}},
        "metrics": {"tensorboard": None, "wandb": None},
        "notify": {"command": None, "webhook": None},
        "cluster": {"address": None, "namespace": "ray_probe", "actors": 2, "max_actors": 4, "gpus_per_actor": 0,
                    "cpus_per_actor": 1, "resources": {}, "runtime_env": {}},
        "output": {"dir": "runs", "name": None, "save_gradient": False, "commit_rounds": 1},
    }  # fmt: skip


@pytest.mark.parametrize(("actors", "max_actors", "slots"), [(2, 4, 4), (8, 4, 8), (1, 1, 1)])
def test_there_are_never_fewer_slots_than_actors(actors, max_actors, slots):
    raw = {**MINIMAL, "cluster": {"actors": actors, "max_actors": max_actors}}
    assert config_from_dict(raw).cluster.slots == slots


def test_a_dumped_config_is_read_back_equal(tmp_path):
    raw = with_value("data.prompts", ["1e-3", "yes", "a\nb ", "ü\u2028😀", "null", "- x"])
    raw["estimator"] = {"baseline": {"ridge_lambda": 1e-12, "features": ["margin", "H"]}}
    raw["generation"] = {"eos_token_ids": []}
    raw["cluster"] = {"runtime_env": {"env_vars": {"NO": "1"}}, "resources": {"a": 0.5}, "address": "[::1]:6379"}
    config = config_from_dict(raw)
    path = tmp_path / "config.yaml"
    path.write_text(dump_yaml(config), encoding="utf-8")
    assert load_config(path) == config
    assert config_from_dict(json.loads(json.dumps(to_dict(config), allow_nan=False))) == config
    assert pickle.loads(pickle.dumps(config)) == config


def test_overrides_win_over_the_file_in_order(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("model: {path: m}\ndata: {prompts: p.jsonl}\nbatch: {rounds: 9}\n")
    overrides = [
        "estimator.baseline.mode=none", "estimator.baseline.features=[H, top1]", "estimator.baseline.ridge_lambda=1e-3",
        "batch.rounds=3", "batch.rounds=5", "generation.eos_token_ids=[]", "output.name=null",
        "cluster.resources.slot=1", "data.repeat=false", r"model.trainable=.*\.mlp\..*",
    ]  # fmt: skip
    config = load_config(str(path), overrides)
    baseline = config.estimator.baseline
    assert (baseline.mode, baseline.features, baseline.ridge_lambda) == ("none", ("H", "top1"), 1e-3)
    assert (config.batch.rounds, config.generation.eos_token_ids, config.data.repeat) == (5, (), False)
    assert (config.cluster.resources, config.model.trainable) == ({"slot": 1}, r".*\.mlp\..*")


@pytest.mark.parametrize(("override", "start"), [
    ("batch.rounds", "--set: got 'batch.rounds'; need dotted.key=value"),
    ("batch.rounds=many", "batch.rounds: got 'many'; need null or an integer >= 1"),
    ("batch.rounds=[1", "batch.rounds: got '[1'; "),
    ("generation.temperature=.nan", "generation.temperature: got nan; need a finite number > 0"),
    ("batch=3", "batch: got 3; need a mapping"),
    ("model.path.x=1", "model.path: got 'm'; need a mapping to set 'model.path.x'"),
], ids=lambda value: value if "=" in value else "")  # fmt: skip
def test_a_bad_override_is_refused_like_a_bad_file(tmp_path, override, start):
    path = tmp_path / "run.yaml"
    path.write_text("{model: {path: m}, data: {prompts: p.jsonl}}")
    with pytest.raises(ConfigError) as caught:
        load_config(path, [override])
    assert str(caught.value).startswith(start)


@pytest.mark.parametrize("dotted", [name for name in fields() if name != "model.path"])
def test_no_field_of_a_config_can_be_set_anew(dotted):
    *sections, name = dotted.split(".")
    config = config_from_dict(MINIMAL)
    section = value_at(config, ".".join(sections)) if sections else config
    with pytest.raises(ValidationError, match="frozen"):
        setattr(section, name, None)


@pytest.mark.parametrize(("dotted", "info"), fields().items(), ids=fields())
def test_every_field_says_what_it_means(dotted, info):
    assert info.description and info.description.endswith("."), dotted


SIBLINGS = ("sibling_mu", "sibling_total")


@pytest.mark.parametrize(
    ("features", "responses", "columns"),
    [
        ("recommended", 1, (*LOGIT_COLUMNS, "entropy_so_far", "position_mean")),
        ("recommended", 2, (*LOGIT_COLUMNS, *SIBLINGS, "entropy_so_far", "position_mean")),
        ("recommended", 16, (*LOGIT_COLUMNS, *SIBLINGS, "entropy_so_far", "position_mean")),
        ("logits", 4, LOGIT_COLUMNS),
        (["sibling_mu", "H"], 4, ("sibling_mu", "H")),
        (["position_mean", "H"], 1, ("position_mean", "H")),
    ],
)
def test_a_set_of_features_is_a_table_by_responses_per_prompt_and_a_list_is_taken_as_it_stands(
    features, responses, columns
):
    raw = {**MINIMAL, "batch": {"responses_per_prompt": responses}, "estimator": {"baseline": {"features": features}}}
    assert config_from_dict(raw, "test").columns == columns


def batch_with(target: object, **changes: object) -> dict[str, object]:
    return {**MINIMAL, "batch": {"rounds": None, "max_sequences": 4096, "target_error": target, **changes}}


@pytest.mark.parametrize("good", [{"of": "entropy", "nats": 0.1}, {"of": "gradient", "relative": 0.2}, None])
def test_a_target_error_is_taken(good):
    config = config_from_dict(batch_with(good))
    assert config_from_dict(json.loads(json.dumps(to_dict(config), allow_nan=False))) == config


@pytest.mark.parametrize(
    ("target", "changes", "said"),
    [
        ({"of": "entropy"}, {}, "batch.target_error.relative: got None; set relative or nats, and not both"),
        ({"of": "entropy", "nats": 1.0, "relative": 1.0}, {}, "relative: got 1.0; set relative or nats"),
        ({"of": "gradient", "nats": 1.0}, {}, "batch.target_error.nats: got 1.0; need relative"),
        ({"of": "entropy", "nats": -1.0}, {}, "batch.target_error.nats: got -1.0; need null or a finite number > 0"),
        ({"of": "norm", "relative": 1.0}, {}, "batch.target_error.of: got 'norm'; need 'gradient', 'entropy' or"),
        ({"off": "entropy"}, {}, "did you mean 'batch.target_error.of'?"),
        (0.1, {}, "batch.target_error: got 0.1; need a mapping with keys from of, relative, nats"),
        ({"of": "entropy", "nats": 1.0}, {"rounds": 4}, "batch.rounds: got 4; need null"),
        ({"of": "entropy", "nats": 1.0}, {"max_sequences": None}, "batch.rounds: got None; need a number of rounds"),
    ],
)
def test_a_target_error_that_cannot_end_a_run_is_refused(target, changes, said):
    with pytest.raises(ConfigError) as refused:
        config_from_dict(batch_with(target, **changes))
    assert said in str(refused.value) and "\n" not in str(refused.value)
