"""What is done about a fault: pure decisions, no Ray and no clock of its own.

Something is seen of an actor (a `Fault`) that is starting, idle or at a shard (its `Situation`); `decide` says what
becomes of the actor, of the shard in its hand, and of the run. The pool carries it out, the schedule keeps count.

| seen | at a shard | idle | starting |
| --- | --- | --- | --- |
| `Raised`, an error of the shard | charged, actor stays | | |
| `Raised`, an error of the run | the run ends with it | | it ends, unless others have started |
| `Raised`, a broken device | charged, replaced | | replaced |
| `Died` | charged (spared when its node is gone), replaced | replaced | replaced |
| `Unreachable` | it is asked again for a while, then spared, replaced | the same | the same |
| `AnswersAgain` | spared, replaced: nobody knows how far it is | stays | replaced |
| `Quiet` for its limit | charged, replaced | replaced | replaced |
| `NoRoom` | | | it waits, or the run ends when no actor has a place |

Charged: one of the shard's three attempts. Spared: done again without that, within reason. What else the actor had done
and not committed is done again without being charged. Seconds are those of a
`ray_probe.cluster.pool.clock.Watch`.
"""

from dataclasses import dataclass
from typing import Literal

from ray_probe.cluster.actors.task_errors import breaks_the_device, concerns_the_run, is_of_memory
from ray_probe.errors import ClusterError, InputError, ProbeError

MAX_ATTEMPTS = 3
MAX_SPARED = 9

LESS_MEMORY = "lower batch.shard_prompts, generation.tf_batch_size or generation.max_new_tokens"

Doing = Literal["starting", "idle", "working"]
Blame = Literal["charged", "spared"]


@dataclass(frozen=True)
class Limits:
    """Seconds after which something is done.

    Attributes:
        stall_deadline_s: at a shard without a token more: by tokens, never by time, which would favour short responses.
        start_deadline_s: to start and load the checkpoint.
        place_deadline_s: without a place on any node.
        report_room_s: without a place on any node, before that is reported; longer than `ask_every_s`.
        idle_deadline_s: idle and without an answer.
        unreachable_deadline_s: not reachable and not known to be dead.
        fresh_s: an idle actor that was heard of less lately is asked before it is given a shard.
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
        """Seconds between two questions to a busy actor."""
        return min(5.0, self.stall_deadline_s / 4)


@dataclass(frozen=True)
class Raised:
    """A task raised; its actor lives. `cause` is the error in one line."""

    error: Exception
    cause: str


@dataclass(frozen=True)
class Died:
    """The actor's process, or its node, is gone. `by_memory`: it seems that memory ran out."""

    cause: str
    by_memory: bool = False
    node_lost: bool = False


@dataclass(frozen=True)
class Unreachable:
    """The actor cannot be reached since so many seconds, and is not known to be dead."""

    cause: str
    seconds: float


@dataclass(frozen=True)
class AnswersAgain:
    """An actor that was not reachable answers. Its task may be over, at work still, or never have come."""

    cause: str


@dataclass(frozen=True)
class Quiet:
    """So many seconds without a token (at a shard), an answer (idle), or the checkpoint loaded (starting)."""

    seconds: float


@dataclass(frozen=True)
class NoRoom:
    """No node has room for the actor since so many seconds; what each of the actors asks for, and what is free."""

    seconds: float
    actors: int
    asked: str
    free: str


Fault = Raised | Died | Unreachable | AnswersAgain | Quiet | NoRoom


@dataclass(frozen=True)
class Situation:
    """What the actor is doing, and how the others are.

    Attributes:
        doing: idle includes what has been refused the checkpoint.
        loaded_elsewhere: some actor has loaded the checkpoint, so nothing is wrong with it.
        refused: the run was told already that the checkpoint cannot be loaded.
        placed_elsewhere: some actor has a process.
    """

    doing: Doing
    loaded_elsewhere: bool = False
    refused: bool = False
    placed_elsewhere: bool = False


@dataclass(frozen=True)
class Decision:
    """What is to be done; nothing but to wait, if nothing is said.

    Attributes:
        cause: one line for people.
        replace: kill the actor; another is started.
        shard: whether the shard in its hand, done again elsewhere, is charged an attempt; None: it has none.
        by_memory: it seems that memory ran out.
        error: ends the run.
    """

    cause: str = ""
    replace: bool = False
    shard: Blame | None = None
    by_memory: bool = False
    error: ProbeError | None = None


WAIT = Decision()


def decide(fault: Fault, situation: Situation, limits: Limits) -> Decision:
    """What is done about a fault (see the table above)."""
    match fault:
        case Raised():
            return _raised(fault, situation)
        case Died(cause, by_memory, node_lost):
            return _gone(cause, situation, "spared" if node_lost else "charged", by_memory)
        case Unreachable(cause, seconds):
            told = f"not reachable for {limits.unreachable_deadline_s:g} s ({cause})"
            return WAIT if seconds < limits.unreachable_deadline_s else _gone(told, situation, "spared")
        case AnswersAgain(cause):
            told = f"was not reachable for a while ({cause})"
            return WAIT if situation.doing == "idle" else _gone(told, situation, "spared")
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
        return WAIT  # as another actor has said
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
        return WAIT  # it gets a process as soon as there is room: a node, say
    told = (
        f"cluster.actors: got {fault.actors}; none was placed in {limits.place_deadline_s:g} s: each asks for "
        f"{fault.asked}, free are {fault.free}; wait until others are done, or ask for less"
    )
    return Decision(told, error=ClusterError(told))


def refuses_the_checkpoint(fault: Fault, situation: Situation) -> bool:
    """Whether an actor refused a checkpoint that others have loaded: it was overwritten since, for another one too."""
    return situation.doing == "starting" and isinstance(fault, Raised) and isinstance(fault.error, InputError)


def is_charged(blame: Blame, spared: int) -> bool:
    """Whether a shard that must be done again is charged an attempt.

    Args:
        blame: what was decided.
        spared: how often it was spared before: a shard that it always happens to is no accident.
    """
    return blame == "charged" or spared >= MAX_SPARED


MAX_FAILED_STARTS = 3


MAX_REFUSALS = 3


MAX_IDLE_DEATHS = 10


class RestartBudget:
    """Whether actors that are gone are still replaced: never without end.

    Starting that failed three times in a row speaks against it, and so do actors that die idle, of no shard, again and
    again. Deaths at a shard need no limit here: they use up its attempts. A checkpoint that was refused three times,
    overwritten since it was loaded say, is refused in every later round too.
    """

    def __init__(self) -> None:
        self._failed = self._idle_deaths = self._refusals = 0

    def worked(self) -> None:
        """An actor has started."""
        self._failed = 0

    def lost(self, doing: Doing, refused: bool = False) -> None:
        """An actor is gone that was doing this; `refused`: it refused the checkpoint."""
        self._refusals += refused
        self._failed += doing == "starting"
        self._idle_deaths += doing == "idle"

    def forgive(self) -> None:
        """Count anew, but for refusals: what kept actors from starting may be over, for a new round say."""
        self._failed = self._idle_deaths = 0

    def reset(self) -> None:
        """Count all anew: there is another checkpoint, or a person asks for actors."""
        self._refusals = 0
        self.forgive()

    @property
    def refused(self) -> bool:
        """Whether the checkpoint was refused too often for another actor to be started."""
        return self._refusals >= MAX_REFUSALS

    def go_on(self, asked: int) -> bool:
        """Whether missing actors are started, of so many that were asked for."""
        return (
            not self.refused and self._failed < MAX_FAILED_STARTS and self._idle_deaths < MAX_IDLE_DEATHS * asked
        )
