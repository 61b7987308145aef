"""Decides what follows from a fault of a rollout actor. Pure, no Ray and no clock.

The observer sees a `Fault` of an actor that is starting, idle or working (its `Situation`). `decide` says what follows
for the actor, for its shard and for the run. The pool carries that out, and the schedule counts attempts.

| fault | working | idle | starting |
| --- | --- | --- | --- |
| `Raised`, an error of the shard | charged, actor stays | | |
| `Raised`, an error of the run | the run ends with it | | it ends, unless others have started |
| `Raised`, a broken device | charged, replaced | | replaced |
| `Died` | charged (spared when its node is gone), replaced | replaced | replaced |
| `Unreachable` | retried for a while, then spared, replaced | the same | the same |
| `AnswersAgain` | spared, replaced: its progress is unknown | stays | replaced |
| `Quiet` for its limit | charged, replaced | replaced | replaced |
| `NoRoom` | | | it waits, or the run ends when no actor has a place |

Charged: the failure counts as one of the shard's three attempts. Spared: it does not, up to a limit. Other shards whose
results were lost with the actor are retried without being charged. Seconds are those of a `LookClock`.
"""

from dataclasses import dataclass
from typing import Literal

from ray_probe.cluster.actors.task_errors import breaks_the_device, concerns_the_run, is_of_memory
from ray_probe.errors import ClusterError, InputError, ProbeError

MAX_ATTEMPTS = 3
MAX_SPARED = 9
MAX_FAILED_STARTS = 3
MAX_REFUSALS = 3
MAX_IDLE_DEATHS = 10

LESS_MEMORY = "lower batch.shard_prompts, generation.tf_batch_size or generation.max_new_tokens"

Doing = Literal["starting", "idle", "working"]
Blame = Literal["charged", "spared"]


@dataclass(frozen=True)
class Limits:
    """Timeouts in seconds.

    Attributes:
        stall_deadline_s: working without a new token; a limit on time would favour short responses.
        start_deadline_s: starting and loading the checkpoint.
        place_deadline_s: without room on any node.
        report_room_s: without room on any node, before that is reported; longer than `ask_every_s`.
        idle_deadline_s: idle without an answer.
        unreachable_deadline_s: not reachable and not known to be dead.
        fresh_s: age of an idle actor's last answer, past which it must answer before it takes a shard.
    """

    stall_deadline_s: float = 300.0
    start_deadline_s: float = 600.0
    place_deadline_s: float = 30.0
    report_room_s: float = 8.0
    idle_deadline_s: float = 60.0
    unreachable_deadline_s: float = 30.0
    fresh_s: float = 0.5

    @property
    def ask_every_s(self) -> float:
        """Seconds between two heartbeats of a working actor."""
        return min(5.0, self.stall_deadline_s / 4)


@dataclass(frozen=True)
class Raised:
    """A task raised, and its actor lives. `cause` is the error in one line."""

    error: Exception
    cause: str


@dataclass(frozen=True)
class Died:
    """The actor's process or node is gone. `by_memory`: memory seems to have run out."""

    cause: str
    by_memory: bool = False
    node_lost: bool = False


@dataclass(frozen=True)
class Unreachable:
    """The actor is not reachable for `seconds`, and not known to be dead."""

    cause: str
    seconds: float


@dataclass(frozen=True)
class AnswersAgain:
    """An actor that was not reachable answers.

    Its task may be over, still running, or never have arrived.
    """

    cause: str


@dataclass(frozen=True)
class Quiet:
    """`seconds` without a token (working), an answer (idle) or the end of a start."""

    seconds: float


@dataclass(frozen=True)
class NoRoom:
    """No node has room for the actor.

    Attributes:
        seconds: for how long.
        actors: actors asked for.
        asked: resources of one actor.
        free: what of them is free on the cluster.
    """

    seconds: float
    actors: int
    asked: str
    free: str


Fault = Raised | Died | Unreachable | AnswersAgain | Quiet | NoRoom


@dataclass(frozen=True)
class Situation:
    """What the actor is doing, and the state of the others.

    Attributes:
        doing: of the actor; idle includes actors that refused the checkpoint.
        loaded_elsewhere: an actor has loaded the checkpoint, so nothing is wrong with it.
        refused: it was already reported that the checkpoint cannot be loaded.
        placed_elsewhere: an actor has a process.
    """

    doing: Doing
    loaded_elsewhere: bool = False
    refused: bool = False
    placed_elsewhere: bool = False


@dataclass(frozen=True)
class Decision:
    """What follows from a fault; by default the pool waits.

    Attributes:
        cause: one line for people.
        replace: kill the actor and start another.
        shard: whether the retry of its shard is charged; None: the actor has no shard.
        by_memory: memory seems to have run out.
        error: ends the run.
    """

    cause: str = ""
    replace: bool = False
    shard: Blame | None = None
    by_memory: bool = False
    error: ProbeError | None = None


WAIT = Decision()


def decide(fault: Fault, situation: Situation, limits: Limits) -> Decision:
    """Decide about a fault (see the table above)."""
    match fault:
        case Raised():
            return _raised(fault, situation)
        case Died(cause, by_memory, node_lost):
            return _gone(cause, situation, "spared" if node_lost else "charged", by_memory)
        case Unreachable(reason, seconds):
            cause = f"not reachable for {limits.unreachable_deadline_s:g} s ({reason})"
            return WAIT if seconds < limits.unreachable_deadline_s else _gone(cause, situation, "spared")
        case AnswersAgain(reason):
            cause = f"was not reachable for a while ({reason})"
            return WAIT if situation.doing == "idle" else _gone(cause, situation, "spared")
        case Quiet(seconds):
            return _quiet(seconds, situation, limits)
        case NoRoom():
            return _no_room(fault, situation, limits)


def _gone(cause: str, situation: Situation, blame: Blame, by_memory: bool = False) -> Decision:
    return Decision(cause, True, blame if situation.doing == "working" else None, by_memory)


def _raised(fault: Raised, situation: Situation) -> Decision:
    error, cause, by_memory = fault.error, fault.cause, is_of_memory(fault.error)
    if situation.doing == "working":
        if concerns_the_run(error):
            return Decision(cause, error=error)
        return Decision(cause, breaks_the_device(error), "charged", by_memory)
    if situation.refused:
        return WAIT  # another actor's error is reported
    if isinstance(error, ProbeError) and not situation.loaded_elsewhere:
        return Decision(cause, error=error)
    return _gone(cause, situation, "charged", by_memory)


def _quiet(seconds: float, situation: Situation, limits: Limits) -> Decision:
    limit, what = {
        "working": (limits.stall_deadline_s, "no token in"),
        "starting": (limits.start_deadline_s, "did not start in"),
        "idle": (limits.idle_deadline_s, "idle, and no answer in"),
    }[situation.doing]
    return WAIT if seconds <= limit else _gone(f"{what} {limit:g} s", situation, "charged")


def _no_room(fault: NoRoom, situation: Situation, limits: Limits) -> Decision:
    if fault.seconds <= limits.place_deadline_s or situation.placed_elsewhere:
        return WAIT  # Ray starts it as soon as there is room
    cause = (
        f"cluster.actors: got {fault.actors}; none was placed in {limits.place_deadline_s:g} s: each asks for "
        f"{fault.asked}, free are {fault.free}; wait until others are done, or ask for less"
    )
    return Decision(cause, error=ClusterError(cause))


def refuses_the_checkpoint(fault: Fault, situation: Situation) -> bool:
    """Whether an actor refused a checkpoint that others have loaded."""
    # It was overwritten since, so every other actor will refuse it too.
    return situation.doing == "starting" and isinstance(fault, Raised) and isinstance(fault.error, InputError)


def is_charged(blame: Blame, spared: int) -> bool:
    """Whether the retry of a shard is charged as an attempt.

    Args:
        blame: of the decision.
        spared: how often the shard was spared before; from `MAX_SPARED` times on the shard itself is suspect.
    """
    return blame == "charged" or spared >= MAX_SPARED


class RestartBudget:
    """Limits how often lost actors are replaced.

    The limits count failed starts in a row, deaths of idle actors, and refusals of the checkpoint, which hold for later
    rounds too. Deaths of working actors need no limit, because they use up the attempts of their shards.
    """

    def __init__(self) -> None:
        self._failed = self._idle_deaths = self._refusals = 0

    def worked(self) -> None:
        """An actor has started."""
        self._failed = 0

    def lost(self, doing: Doing, refused: bool = False) -> None:
        """Count a lost actor by what it was doing; `refused`: it refused the checkpoint."""
        self._refusals += refused
        self._failed += doing == "starting"
        self._idle_deaths += doing == "idle"

    def forgive(self) -> None:
        """Reset all counts but refusals, at the begin of a round."""
        self._failed = self._idle_deaths = 0

    def reset(self) -> None:
        """Reset all counts, for another checkpoint or at a person's request."""
        self._refusals = 0
        self.forgive()

    @property
    def refused(self) -> bool:
        """Whether the checkpoint was refused too often to start another actor."""
        return self._refusals >= MAX_REFUSALS

    def go_on(self, asked: int) -> bool:
        """Whether missing actors are started, of `asked` actors."""
        return (
            not self.refused and self._failed < MAX_FAILED_STARTS and self._idle_deaths < MAX_IDLE_DEATHS * asked
        )
