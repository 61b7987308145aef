"""What a diagnosis is made of: steps that look at one thing each, and the line that comes of it."""

import threading
from collections.abc import Callable, Collection, Iterable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Literal, NamedTuple

from ray_probe.config.schema import ClusterConfig, ProbeConfig
from ray_probe.errors import InputError, ProbeError

if TYPE_CHECKING:
    from ray_probe.checkpoints.load import Checkpoint
    from ray_probe.cluster.connection.nodes import Node
    from ray_probe.run.prepared import PreparedRun

Status = Literal["ok", "warning", "failed", "skipped", "omitted"]


@dataclass(frozen=True)
class Check:
    """One line of a diagnosis.

    Attributes:
        name: what was looked at.
        status: ok, warning (it holds, and there is something to know), failed, skipped (something that it needs
            does not hold), or omitted (nobody asked to look at it).
        detail: what was found.
        remedy: what to do about it, or None.
        exit_code: of the command, were this the first thing that is wrong; 0 when nothing is.
    """

    name: str
    status: Status
    detail: str
    remedy: str | None = None
    exit_code: int = 0

    @property
    def ok(self) -> bool:
        """Whether nothing that was looked at is wrong."""
        return self.status in ("ok", "warning", "omitted")


class Finding(NamedTuple):
    """What a step found to hold; a remedy makes it a warning. What does not hold is raised as a ProbeError.

    Attributes:
        detail: what was found, or what was not looked at.
        remedy: what to do about it.
        looked: False when the step did not look.
    """

    detail: str
    remedy: str | None = None
    looked: bool = True

    @property
    def status(self) -> Status:
        """The status of its check."""
        if not self.looked:
            return "omitted"
        return "ok" if self.remedy is None else "warning"


@dataclass
class Case:
    """What is examined, and what the steps have found that later ones use.

    Attributes:
        config: the run to be, or None to look at this machine, and a cluster, alone.
        cluster: where it would run.
        token_path: token of a cluster that another ray_probe started.
        loopback: that cluster is on this machine.
        self_test_s: time for the self-test.
        stack: holds the connection to the cluster.
        found: the checkpoint, when it can be used.
        prepared: the run, when all of its files can be used.
        unusable: why the prompts cannot be, when the checkpoint can.
        longest: of the prompts, in tokens, when they can be used.
        nodes: of the connected cluster.
    """

    config: ProbeConfig | None
    cluster: ClusterConfig
    token_path: str | None
    loopback: bool
    self_test_s: float
    stack: ExitStack
    found: "Checkpoint | None" = None
    prepared: "PreparedRun | None" = None
    unusable: InputError | None = None
    longest: int = 0
    nodes: list["Node"] = field(default_factory=list)

    @property
    def run(self) -> ProbeConfig:
        """The config, in steps that exist only where there is one."""
        assert self.config is not None
        return self.config

    @property
    def checkpoint(self) -> "Checkpoint":
        """The checkpoint, in steps that need it."""
        assert self.found is not None
        return self.found


class Step(NamedTuple):
    """One thing to look at.

    Attributes:
        name: of the check.
        look: raises a ProbeError when it does not hold.
        needs: names of the steps that must hold for this one to mean anything.
        limit_s: how long it may take, for one that waits in nothing that has a deadline of its own.
    """

    name: str
    look: Callable[[Case], Finding]
    needs: tuple[str, ...] = ()
    limit_s: float | None = None


def examine(step: Step, case: Case, held: Collection[str]) -> Check:
    """Take one step.

    Args:
        step: what to look at.
        case: what is examined.
        held: names of the steps so far that hold.
    """
    missing = [name for name in step.needs if name not in held]
    if missing:
        return Check(step.name, "skipped", f"needs {', '.join(missing)}")
    try:
        found = step.look(case) if step.limit_s is None else _within(step.limit_s, step.look, case)
    except ProbeError as error:
        return _failed(step.name, str(error), error.exit_code)
    except Exception as error:  # a diagnosis names what is broken, whatever it is, and goes on
        return _failed(step.name, f"{type(error).__name__}: {error}", 1)
    return Check(step.name, found.status, found.detail, found.remedy)


def exit_code(checks: Iterable[Check]) -> int:
    """What the command ends with: 0 when everything holds, else the code of the first thing that does not."""
    return next((check.exit_code for check in checks if not check.ok), 0)


def to_json(checks: Iterable[Check]) -> dict[str, object]:
    """A diagnosis for machines: `ok`, and the checks in order with all that their lines say."""
    listed = list(checks)
    return {
        "ok": all(check.ok for check in listed),
        "checks": [{"ok": check.ok, **asdict(check)} for check in listed],
    }


def _failed(name: str, message: str, code: int) -> Check:
    """Our errors end with the remedy, after their last semicolon."""
    line = " ".join(message.split())
    detail, _, remedy = line.rpartition("; ")
    return Check(name, "failed", detail or line, remedy if detail else None, code)


def _within(seconds: float, look: Callable[[Case], Finding], case: Case) -> Finding:
    """Look in a thread, which is left behind when it takes longer: a file system may never answer."""
    outcome: list[Finding | BaseException] = []

    def work() -> None:
        try:
            outcome.append(look(case))
        except BaseException as error:
            outcome.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)
    if not outcome:
        raise ProbeError(f"no end after {seconds:g} s; check the file system that it lies on")
    if isinstance(outcome[0], BaseException):
        raise outcome[0]
    return outcome[0]
