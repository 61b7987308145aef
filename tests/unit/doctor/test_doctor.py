"""A diagnosis names each fault in one line, and no fault hides another."""

import io
import itertools
import json
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import safetensors.torch
import torch
from support.adapters import write_adapter
from support.checkpoints import raw_config, write_checkpoint

from ray_probe.checkpoints.headers import weight_headers
from ray_probe.checkpoints.memory_forecast import size
from ray_probe.cli.tables.doctor_table import shown
from ray_probe.config.loading import config_from_dict
from ray_probe.config.schema import ClusterConfig, ProbeConfig
from ray_probe.doctor import files as doctor_files
from ray_probe.doctor import machine, packages, token
from ray_probe.doctor import self_test as self_test_module
from ray_probe.doctor.checks import Case, Check, Finding, Step, examine, exit_code, to_json
from ray_probe.doctor.diagnosis import diagnose
from ray_probe.doctor.self_test import SelfTestResult
from ray_probe.errors import ConfigError

TOKEN = "0123456789abcdef" * 4
PASSED = SelfTestResult({"rb_residual": 2e-16}, (), 0.1)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("doctor")
    raw_config(directory)
    return directory


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No RAY_* variables or token of the user's, and a self-test that has passed."""
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(self_test_module, "self_test", lambda seconds: PASSED)


@pytest.fixture
def nowhere() -> Iterator[str]:
    """An address that refuses connections: bound, so not free, and not listening."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{held.getsockname()[1]}"


@pytest.fixture
def configured(files: Path, nowhere: str) -> Callable[..., ProbeConfig]:
    """A config whose files are fine and whose cluster does not answer."""

    def build(**sections: dict[str, Any]) -> ProbeConfig:
        cluster = {"address": nowhere} | sections.pop("cluster", {})
        return config_from_dict(raw_config(files, cluster=cluster, **sections))

    return build


def by_name(config: ProbeConfig, **options: Any) -> dict[str, Check]:
    return {check.name: check for check in diagnose(config, **options)}


def look(step: Callable[[Case], Finding], config: ProbeConfig | None = None, limit_s: float | None = None) -> Check:
    where = config.cluster if config else ClusterConfig()
    case = Case(config, where, None, False, 1.0, None)  # type: ignore[arg-type]
    return examine(Step("it", step, limit_s=limit_s), case, set())


# What hides nothing


def test_an_unreachable_cluster_is_told_within_3_s_and_all_that_needs_none_is_looked_at(configured, nowhere: str):
    start = time.monotonic()
    checks = diagnose(configured())
    first = {check.name: check for check in itertools.islice(checks, 3)}
    assert time.monotonic() - start < 3
    assert first["cluster"].status == "failed" and first["cluster"].exit_code == 4
    assert first["cluster"].detail.startswith(f"cluster.address: got '{nowhere}'; no Ray cluster answers there")
    assert first["cluster"].remedy is not None and "ray start --head" in first["cluster"].remedy
    rest = {check.name: check for check in checks}
    assert {name for name, check in rest.items() if check.ok} == {
        "torch", "checkpoint", "end of response", "prompts", "model", "run directory", "disk", "self-test",
    }  # fmt: skip
    assert rest["model"].status == "omitted"
    skipped = {name: check.detail for name, check in rest.items() if not check.ok}
    assert skipped["resources"] == "needs cluster" and rest["resources"].status == "skipped"
    assert skipped["checkpoint on nodes"] == "needs resources"
    assert exit_code([*first.values(), *rest.values()]) == 4


def test_a_checkpoint_that_cannot_be_used_hides_neither_prompts_nor_run_directory(configured, tmp_path: Path):
    checks = by_name(configured(model={"path": str(tmp_path / "none")}))
    assert checks["checkpoint"].status == "failed" and checks["checkpoint"].exit_code == 2
    assert checks["checkpoint"].detail.startswith("model.path: got ") and checks["checkpoint"].remedy is not None
    assert checks["prompts"].ok and "24 prompts" in checks["prompts"].detail
    assert checks["run directory"].ok and checks["self-test"].ok
    assert checks["disk"].detail == "needs checkpoint"


def test_the_end_of_a_response_is_shown_with_its_text_and_a_warning_where_sources_differ(
    configured, files: Path, tmp_path: Path
):
    shutil.copytree(files / "model", tmp_path / "model")
    config, plain = tmp_path / "model" / "config.json", {"model": {"path": str(tmp_path / "model")}}

    def look(**sections: Any) -> Check:
        return by_name(configured(**plain, **sections))["end of response"]

    detail = "responses end at 0 '<eos>' (generation_config.json)"
    assert look() == Check("end of response", "ok", detail)
    config.write_text(json.dumps(json.loads(config.read_text()) | {"eos_token_id": 2}))
    remedy = "set generation.eos_token_ids, which decides"
    assert look() == Check("end of response", "warning", f"{detail}, but config.json names 2 '1'", remedy)
    assert look(generation={"eos_token_ids": [2]}).detail == "responses end at 2 '1' (generation.eos_token_ids)"


def test_a_checkpoint_that_names_no_end_is_refused_as_such(configured, files: Path, tmp_path: Path):
    shutil.copytree(files / "model", tmp_path / "model")
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        raw = json.loads((tmp_path / "model" / name).read_text())
        raw |= {"eos_token_id": None, "eos_token": None}
        (tmp_path / "model" / name).write_text(json.dumps(raw))
    checks = by_name(configured(model={"path": str(tmp_path / "model")}))
    assert checks["checkpoint"].status == "failed" and "names no EOS token" in checks["checkpoint"].detail
    assert checks["end of response"].status == "skipped" and checks["prompts"].ok


def test_prompts_that_cannot_be_used_do_not_hide_the_checkpoint(configured):
    checks = by_name(configured(data={"field": "question"}))
    assert checks["checkpoint"].ok and "parameters" in checks["checkpoint"].detail
    assert checks["prompts"].status == "failed" and checks["prompts"].exit_code == 2
    assert "no field 'question'" in checks["prompts"].detail
    assert checks["disk"].ok


def test_a_checkpoint_whose_weights_are_not_finite_is_named_as_what_is_wrong(configured, tmp_path: Path):
    checkpoint = Path(shutil.copytree(configured().model.path, tmp_path / "c"))
    tensors = safetensors.torch.load_file(checkpoint / "model.safetensors")
    tensors["model.norm.weight"][0] = torch.nan
    safetensors.torch.save_file(tensors, checkpoint / "model.safetensors", metadata={"format": "pt"})
    checks = by_name(configured(model={"path": str(checkpoint)}))
    assert checks["checkpoint"].status == "failed" and checks["checkpoint"].exit_code == 2
    assert "NaN or infinity in 1 tensors: model.norm.weight" in checks["checkpoint"].detail
    assert checks["prompts"].ok


def test_what_a_step_raises_of_its_own_is_a_line_too():
    def broken(case: Case) -> Finding:
        raise TypeError("two\nlines")

    assert look(broken) == Check("it", "failed", "TypeError: two lines", None, 1)


def test_a_file_system_that_never_answers_is_given_up():
    def stuck(case: Case) -> Finding:
        threading.Event().wait(30)
        return Finding("late")

    start = time.monotonic()
    assert "no end after 0.2 s" in look(stuck, limit_s=0.2).detail
    assert time.monotonic() - start < 2


def test_checks_come_one_by_one_as_they_are_asked_for(configured, monkeypatch: pytest.MonkeyPatch):
    looked = []
    monkeypatch.setattr(token, "token", lambda case: looked.append("token"))
    checks = diagnose(configured())
    assert next(checks).name == "versions"
    assert looked == []
    checks.close()


# The model


def test_what_only_the_loaded_model_shows_is_named_as_not_looked_at(configured):
    check = by_name(configured())["model"]
    assert (check.status, check.ok, check.exit_code) == ("omitted", True, 0)
    assert check.detail.startswith("not looked at: whether the loaded model can be sampled")
    assert "adapter" in check.detail
    assert check.remedy == "add --load"


def compared_with(directory: Path, **compare: Any) -> dict[str, Any]:
    return {"compare": {"against": str(directory)} | compare, "batch": {"responses_per_prompt": 4}}


OF_A = ("checkpoint A", "end of response A", "same tokens")


def test_both_checkpoints_of_a_comparison_are_looked_at_a_line_each(configured, tmp_path: Path):
    a = write_checkpoint(tmp_path / "a", seed=1)
    config = configured(**compared_with(a, parts=True))
    checks = by_name(config)
    assert all(checks[name].status == "ok" for name in ("checkpoint", "end of response", "prompts", *OF_A))
    assert re.match(rf"{re.escape(str(a))}: [\d,]+ parameters, all finite", checks["checkpoint A"].detail)
    fingerprints = [checks[name].detail.rpartition(" ")[2] for name in ("checkpoint", "checkpoint A")]
    assert len(set(fingerprints)) == 2 and str(config.model.path) in checks["checkpoint"].detail
    assert checks["end of response A"].detail == checks["end of response"].detail
    same = checks["same tokens"].detail
    assert re.fullmatch(r"both .* ends of responses, \d+ rendered prompts and architecture", same)
    assert not set(OF_A) & by_name(configured()).keys(), "a run of one checkpoint has no such line"


def test_a_fault_of_a_is_told_on_its_own_line_and_hides_nothing_of_b(configured, tmp_path: Path):
    a = write_checkpoint(tmp_path / "a", seed=1)
    (a / "model.safetensors").unlink()
    checks = by_name(configured(**compared_with(a)), load=True)
    check = checks["checkpoint A"]
    assert (check.status, check.exit_code) == ("failed", 2) and check.detail.startswith(f"compare.against: got '{a}'")
    assert all(checks[name].status == "ok" for name in ("checkpoint", "end of response", "prompts", "disk"))
    assert [checks[name].detail for name in (*OF_A[1:], "model")] == ["needs checkpoint A"] * 2 + [
        "needs checkpoint A, end of response A, same tokens"
    ]


def test_checkpoints_of_other_tokens_fail_on_the_line_of_tokens(configured, tmp_path: Path):
    a = write_checkpoint(tmp_path / "a", seed=1)
    vocabulary = json.loads((a / "tokenizer.json").read_text())
    names = list(vocabulary["model"]["vocab"])
    first, second = names[-2:]
    table = vocabulary["model"]["vocab"]
    table[first], table[second] = table[second], table[first]
    (a / "tokenizer.json").write_text(json.dumps(vocabulary))
    checks = by_name(configured(**compared_with(a)))
    check = checks["same tokens"]
    assert (check.status, check.exit_code) == ("failed", 2) and "2 tokens have another id than in" in check.detail
    assert checks["checkpoint A"].ok and checks["prompts"].ok


def test_a_comparison_needs_no_room_for_a_gradient(configured, tmp_path: Path):
    a = write_checkpoint(tmp_path / "a", seed=1)
    needed = [
        re.search(r"about (\S+ \S+) needed", by_name(config)["disk"].detail)
        for config in (configured(), configured(**compared_with(a)))
    ]
    assert needed[0] is not None and needed[1] is not None
    assert needed[1][1] == size(doctor_files.OTHER_BYTES) != needed[0][1]


def test_both_checkpoints_of_a_comparison_are_put_through_what_it_does(configured, files: Path):
    check = by_name(configured(**compared_with(files / "model", parts=True)), load=True)["model"]
    assert check.status == "ok" and "both checkpoints loaded on cpu; of " in check.detail
    assert "the mean parity gap is " in check.detail


def test_a_loaded_model_is_put_through_all_that_a_run_does(configured):
    check = by_name(configured(), load=True)["model"]
    assert check.status == "ok" and check.exit_code == 0
    assert "loaded on cpu, gradient of 21 parameters; of " in check.detail
    numbers = re.search(r"of (\d+) tokens the mean parity gap is (\S+) nats .* norm (\S+) \(", check.detail)
    assert numbers is not None
    tokens, gap, norm = numbers.groups()
    assert 4 <= int(tokens) <= 64 and float(gap) < 1e-3 and float(norm) > 0


def untrained_dora(model: Path) -> dict[str, Any]:
    """An untrained DoRA; its magnitudes have no counterpart in the base's files."""
    return {"adapter": str(write_adapter(model.parent / "a", model, use_dora=True, spread=0.0))}


def overflowing(model: Path) -> dict[str, Any]:
    tensors = safetensors.torch.load_file(model / "model.safetensors")
    tensors["lm_head.weight"].fill_(3e38)
    safetensors.torch.save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    return {}


@pytest.mark.parametrize(
    ("spoil", "code", "says"),
    [(untrained_dora, 2, "it is inert: it moves no logit"), (overflowing, 1, "the model gave NaN or infinity")],
)
def test_what_the_run_would_refuse_of_a_loaded_model_fails_with_its_exit_code(
    configured, tmp_path: Path, spoil: Callable[[Path], dict[str, Any]], code: int, says: str
):
    checkpoint = Path(shutil.copytree(configured().model.path, tmp_path / "c"))
    config = configured(model={"path": str(checkpoint)} | spoil(checkpoint))
    assert by_name(config)["checkpoint"].ok, "its files do not tell"
    check = by_name(config, load=True)["model"]
    assert (check.status, check.exit_code) == ("failed", code) and says in check.detail


def test_a_model_that_does_not_fit_here_is_not_looked_at_which_is_no_failure(
    configured, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("ray_probe.doctor.model.free_device", lambda cuda: ("the memory", 10))
    check = by_name(configured(), load=True)["model"]
    assert check.status == "omitted" and "weights and gradients take" in check.detail and "has 10 B" in check.detail
    assert check.remedy is not None and "where there is room" in check.remedy


# Versions


def test_versions_name_what_is_installed_and_that_it_is_what_was_tested():
    check = look(packages.versions)
    assert check.ok
    for name in ("torch", "transformers", "ray"):
        assert f"{name} {metadata.version(name)}" in check.detail


def test_an_installed_package_without_its_working_copy_knows_its_ranges_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(packages, "working_copy", lambda: tmp_path)
    python, dependencies = packages.version_ranges()
    assert python.startswith(">=3.") and any(line.startswith("torch>=") for line in dependencies)
    check = look(packages.versions)
    assert check.ok and "tested" not in check.detail


def test_a_version_out_of_range_is_named_with_the_range(monkeypatch: pytest.MonkeyPatch):
    real = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: "4.57.0" if name == "transformers" else real(name))
    check = look(packages.versions)
    assert check.status == "failed" and check.exit_code == 1
    assert "transformers 4.57.0 (need <6,>=5.10.1)" in check.detail


def test_a_version_in_range_that_is_not_the_pinned_one_holds_and_is_told(monkeypatch: pytest.MonkeyPatch):
    pins = packages.tested_versions()
    monkeypatch.setattr(packages, "tested_versions", lambda: pins | {"ray": "2.55.0"})
    check = look(packages.versions)
    assert check.status == "ok" and check.detail.endswith("tested with ray 2.55.0")


def test_a_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch):
    real = metadata.version

    def version(name: str) -> str:
        if name == "psutil":
            raise metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(metadata, "version", version)
    assert "no psutil (need >=5.9)" in look(packages.versions).detail


def test_a_gpu_asked_of_this_machine_and_no_device_is_a_failure_of_torch(files: Path):
    config = config_from_dict(raw_config(files, cluster={"gpus_per_actor": 1}))
    check = look(machine.torch_build, config)
    if check.ok:
        pytest.skip("there is a GPU here")
    assert check.exit_code == 4 and check.detail.startswith("cluster.gpus_per_actor: got 1.0")


# Token


def test_the_source_of_the_token_is_told_and_a_file_that_others_can_read_is_warned_of(
    configured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path = tmp_path / "token"
    path.write_text(TOKEN)
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(path))
    path.chmod(0o644)
    check = look(token.token, configured())
    assert check.status == "warning" and check.remedy == f"chmod 600 {path}"
    assert str(path) in check.detail and "0644" in check.detail
    path.chmod(0o600)
    assert look(token.token, configured()).status == "ok"


def test_token_mode_without_a_token_fails_before_ray_is_asked(configured, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    checks = by_name(configured())
    assert checks["token"].status == "failed" and "no readable token" in str(checks["token"].remedy)
    assert checks["cluster"].detail == "needs token"


def test_without_a_config_a_cluster_can_be_looked_at_by_its_address(nowhere: str):
    checks = list(diagnose(address=nowhere))
    assert [check.name for check in checks] == [
        "versions", "token", "cluster", "packages on nodes", "torch", "self-test", "run",
    ]  # fmt: skip
    assert checks[2].status == "failed" and nowhere in checks[2].detail and checks[-2].ok
    assert checks[-1].status == "omitted" and "not looked at: checkpoint, prompts" in checks[-1].detail
    wrong = [check for check in diagnose(address="http://head:8265") if not check.ok]
    assert wrong[0].exit_code == 2 and "use null, auto or host:port" in str(wrong[0].remedy)


def test_the_token_itself_is_never_told(configured, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
    told = json.dumps(to_json(diagnose(configured())))
    assert "from RAY_AUTH_TOKEN" in told and TOKEN not in told


@pytest.mark.parametrize(
    ("address", "status"), [("127.0.0.1:6379", "ok"), ("[::1]:6379", "ok"), ("10.9.8.7:6379", "warning")]
)
def test_joining_another_machine_without_a_token_is_warned_of(configured, address: str, status: str):
    check = look(token.token, configured(cluster={"address": address}))
    assert check.status == status and "no token is sent" in check.detail


def test_tokens_turned_off_for_a_ray_started_here_are_warned_of(monkeypatch: pytest.MonkeyPatch):
    assert look(token.token).status == "ok"
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    assert look(token.token).status == "warning"


# Room


def test_too_little_shared_memory_is_warned_of_with_what_to_do(monkeypatch: pytest.MonkeyPatch):
    real = shutil.disk_usage
    docker = SimpleNamespace(total=64 * 2**20, free=64 * 2**20)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: docker if path == "/dev/shm" else real(path))
    check = look(machine.room_for_ray)
    assert check.status == "warning" and "--shm-size" in str(check.remedy) and "67.1 MB" in check.detail


def test_a_disk_without_room_for_the_gradients_is_told_with_both_sizes(configured, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(total=10**9, free=10**4))
    monkeypatch.setattr(doctor_files, "OTHER_BYTES", 0)
    numbers = sum(header.size for header in weight_headers(Path(configured().model.path)).values())
    for save, each in ((False, 16), (True, 24)):
        check = by_name(configured(output={"save_gradient": save}))["disk"]
        assert check.status == "failed" and check.detail.startswith("output.dir: 10 kB free at ")
        assert check.detail.endswith(f"about {size(each * numbers)} needed")


def test_a_run_directory_that_exists_is_refused_as_the_run_would(configured, tmp_path: Path):
    (tmp_path / "mine").mkdir()
    check = by_name(configured(output={"dir": str(tmp_path), "name": "mine"}))["run directory"]
    assert check.status == "failed" and check.exit_code == 2 and "exists" in check.detail


# Self-test


@pytest.mark.parametrize(
    ("result", "words"),
    [
        (SelfTestResult({"rb_residual": 1.9, "naive": 1e-16}, (), 1.0), "rb_residual 1.9e+00, naive 1.0e-16"),
        (SelfTestResult({"sampling": 1e-16}, ("naive",), 10.0), "no time for naive"),
    ],
)
def test_a_self_test_that_fails_is_told_with_its_numbers(
    result: SelfTestResult, words: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(self_test_module, "self_test", lambda seconds: result)
    check = look(machine.self_tested)
    assert check.status == "failed" and check.exit_code == 1 and words in check.detail


# Lines


CHECKS = [
    Check("versions", "ok", "torch 2.13.0"),
    Check("token", "warning", "others can read it", "chmod 600 token"),
    Check("cluster", "failed", "no answer", "start one", 4),
    Check("resources", "skipped", "needs cluster"),
    Check("model", "omitted", "not looked at", "add --load"),
]


def test_each_check_is_one_plain_line_when_nobody_watches(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    long = Check("disk", "ok", "x" * 300)
    assert [shown(check, io.StringIO()) for check in (*CHECKS, long)] == [
        "ok       versions             torch 2.13.0\n",
        "warning  token                others can read it; chmod 600 token\n",
        "failed   cluster              no answer; start one\n",
        "skipped  resources            needs cluster\n",
        "omitted  model                not looked at; add --load\n",
        "ok       disk                 " + "x" * 300 + "\n",
    ]


def test_a_terminal_gets_colours_and_every_character(monkeypatch: pytest.MonkeyPatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("TERM", "xterm")
    text = shown(Check("disk", "failed", "[/tmp] " + "x" * 300), Terminal())
    assert "\x1b[" in text and "[/tmp]" + "x" * 300 in "".join(text.split())


def test_machines_get_the_same_with_ok_only_when_everything_holds():
    told = json.loads(json.dumps(to_json(CHECKS)))
    assert told["ok"] is False and [check["ok"] for check in told["checks"]] == [True, True, False, False, True]
    assert told["checks"][2] == {
        "name": "cluster", "ok": False, "status": "failed", "detail": "no answer", "remedy": "start one",
        "exit_code": 4,
    }  # fmt: skip
    assert to_json(CHECKS[:2])["ok"] is True


def test_the_exit_code_is_that_of_the_first_thing_that_is_wrong():
    assert exit_code(CHECKS) == 4 and exit_code(CHECKS[:2]) == 0
    assert exit_code([look(_refuse), CHECKS[2]]) == 2


def _refuse(case: Case) -> Finding:
    raise ConfigError("data.field: got 'q'; choose another")


def test_a_diagnosis_loads_nothing_heavy_before_it_is_asked_for():
    modules = "ray_probe.doctor.diagnosis, ray_probe.cli.tables.doctor_table"
    modules += ", ray_probe.cluster.connection.shared_directory"
    code = f"import sys, {modules}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "ray", "transformers"} & set(done.stdout.split())
