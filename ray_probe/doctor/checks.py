"""The parts of a diagnosis: steps, findings, and the checks that users see."""

import threading
from collections.abc import Callable, Collection, Iterable
from concurrent.futures import Future, wait
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Literal, NamedTuple

from ray_probe.config.schema import ClusterConfig, ProbeConfig
from ray_probe.errors import InputError, ProbeError

if TYPE_CHECKING:
    from ray_probe.checkpoints.inspection import Checkpoint
    from ray_probe.cluster.connection.nodes import Node
    from ray_probe.run.preparation.prepared import PreparedRun

Status = Literal["ok", "warning", "failed", "skipped", "omitted"]


@dataclass(frozen=True)
class Check:
    """One line of a diagnosis.

    Attributes:
        name: of the step.
        status: ok, warning (passed, with advice), failed, skipped (a step that it needs failed), or omitted (not
            requested).
        detail: the finding.
        remedy: what to do, or None.
        exit_code: of the command if this is the first failure; 0 without one.
    """

    name: str
    status: Status
    detail: str
    remedy: str | None = None
    exit_code: int = 0

    @property
    def ok(self) -> bool:
        """Whether the step found nothing wrong."""
        return self.status in ("ok", "warning", "omitted")


class Finding(NamedTuple):
    """The result of a step that passed; failures are raised as ProbeError.

    Attributes:
        detail: what the step found, or did not check.
        remedy: what to do; makes the check a warning.
        looked: False if the step checked nothing.
    """

    detail: str
    remedy: str | None = None
    looked: bool = True

    @property
    def status(self) -> Status:
        """Status of the check."""
        if not self.looked:
            return "omitted"
        return "ok" if self.remedy is None else "warning"


@dataclass
class Case:
    """The subject of a diagnosis, and findings that later steps use.

    Attributes:
        config: of the planned run, or None to check only this machine, and a cluster.
        cluster: the cluster of the run.
        token_path: token of a cluster that another ray_probe started.
        loopback: that cluster is on this machine.
        self_test_s: time limit of the self-test.
        stack: holds the connection to the cluster.
        found: the checkpoint, if it passed.
        against: of a comparison, the checkpoint A, if it passed.
        prepared: the run, if its checkpoints and prompts passed.
        unusable: error of the prompts, if the checkpoint passed and they did not.
        longest: of the prompts, in tokens, if they passed.
        nodes: of the connected cluster.
    """

    config: ProbeConfig | None
    cluster: ClusterConfig
    token_path: str | None
    loopback: bool
    self_test_s: float
    stack: ExitStack
    found: "Checkpoint | None" = None
    against: "Checkpoint | None" = None
    prepared: "PreparedRun | None" = None
    unusable: InputError | None = None
    longest: int = 0
    nodes: list["Node"] = field(default_factory=list)

    @property
    def run(self) -> ProbeConfig:
        """The config, for steps of a diagnosis with one."""
        assert self.config is not None
        return self.config

    @property
    def checkpoint(self) -> "Checkpoint":
        """The checkpoint, for steps that need it."""
        assert self.found is not None
        return self.found

    @property
    def policies(self) -> "list[Checkpoint]":
        """The checkpoint, and A of a comparison, for steps that need them."""
        return [self.checkpoint, *([] if self.against is None else [self.against])]

    @property
    def prepared_run(self) -> "PreparedRun":
        """The prepared run, for steps that need it."""
        assert self.prepared is not None
        return self.prepared


class Step(NamedTuple):
    """One step of a diagnosis.

    Attributes:
        name: of the check.
        look: the check itself; raises ProbeError on failure.
        needs: names of the steps that must pass first.
        limit_s: timeout of a step whose calls have none.
    """

    name: str
    look: Callable[[Case], Finding]
    needs: tuple[str, ...] = ()
    limit_s: float | None = None


def examine(step: Step, case: Case, held: Collection[str]) -> Check:
    """Run one step.

    Args:
        step: the step.
        case: subject of the diagnosis.
        held: names of the steps that passed.
    """
    missing = [name for name in step.needs if name not in held]
    if missing:
        return Check(step.name, "skipped", f"needs {', '.join(missing)}")
    try:
        found = step.look(case) if step.limit_s is None else _within(step.limit_s, step.look, case)
    except ProbeError as error:
        return _failed(step.name, str(error), error.exit_code)
    except Exception as error:  # the diagnosis continues after any error
        return _failed(step.name, f"{type(error).__name__}: {error}", 1)
    return Check(step.name, found.status, found.detail, found.remedy)


def exit_code(checks: Iterable[Check]) -> int:
    """Return the exit code of the first failure, or 0."""
    return next((check.exit_code for check in checks if not check.ok), 0)


def to_json(checks: Iterable[Check]) -> dict[str, object]:
    """Return a diagnosis in plain JSON types: `ok`, and all checks in order."""
    listed = list(checks)
    return {
        "ok": all(check.ok for check in listed),
        "checks": [{"ok": check.ok, **asdict(check)} for check in listed],
    }


def _failed(name: str, message: str, code: int) -> Check:
    """Split the remedy off: messages end with it, after their last semicolon."""
    line = " ".join(message.split())
    detail, _, remedy = line.rpartition("; ")
    return Check(name, "failed", detail or line, remedy if detail else None, code)


def _within(seconds: float, look: Callable[[Case], Finding], case: Case) -> Finding:
    """Run `look` with a timeout, in a thread that is abandoned if a file system hangs."""
    outcome: Future[Finding] = Future()

    def work() -> None:
        try:
            outcome.set_result(look(case))
        except BaseException as error:
            outcome.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    if not wait([outcome], seconds).done:
        raise ProbeError(f"no end after {seconds:g} s; check the file system that it is on")
    return outcome.result()
