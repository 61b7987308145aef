"""The shard plan: prompts of each round and shard, and the seed of every response.

It depends on the number of prompts, the seed and the batch sizes, never on the number of actors.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from ray_probe.errors import PromptsError, bad_value
from ray_probe.run.messages import shard_label

_ORDER_STREAM = 1


@dataclass(frozen=True)
class PromptRef:
    """One use of a prompt: index in the file, pass over the file, and text."""

    index: int
    pass_number: int
    text: str


@dataclass(frozen=True)
class Shard:
    """The unit of work, retry and record: whole prompts of one round."""

    round: int
    index: int
    prompts: tuple[PromptRef, ...]
    seed: int
    responses_per_prompt: int

    @property
    def key(self) -> tuple[int, int]:
        """Round and index, as a key."""
        return self.round, self.index

    @property
    def id(self) -> str:
        """Round and index, both from 0, as results name the shard."""
        return f"{self.round}/{self.index}"

    @property
    def label(self) -> str:
        """Index and round, the round from 1, as messages name the shard."""
        return shard_label(self.round, self.index)

    def response_seeds(self, side: int | None = None, count: int | None = None) -> list[list[tuple[int, ...]]]:
        """Return the seed of each response [B][G], of a policy's half [B][G / 2].

        A seed is (run seed, pass over the file, index in the file, replicate), and in a comparison the side.

        Args:
            side: of a comparison, 0 or 1 for a policy with half of the responses, 2 for the midpoint with G of its
                own; None: a run of one policy.
            count: responses a prompt; None: as `side` says.
        """
        own = () if side is None else (side,)
        size = self.responses_per_prompt // (2 if side in (0, 1) else 1) if count is None else count
        return [
            [(self.seed, ref.pass_number, ref.index, replicate, *own) for replicate in range(size)]
            for ref in self.prompts
        ]


@lru_cache(maxsize=4)
def _order(seed: int, pass_number: int, count: int) -> npt.NDArray[np.int64]:
    sequence = np.random.SeedSequence([seed, pass_number], spawn_key=(_ORDER_STREAM,))
    return np.random.Generator(np.random.Philox(sequence)).permutation(count)


@dataclass(frozen=True)
class Plan:
    """Rounds of shards over a prompts file.

    Args:
        texts: all prompts of the file, by index.
        usable: indices of the prompts that may be used (others were skipped as too long).
        seed: the run's seed.
        prompts_per_round: B.
        responses_per_prompt: G.
        shard_prompts: prompts in one shard; a round's last shard may hold fewer.
        rounds: number of rounds, or None where a budget ends the run.
        repeat: start over, reshuffled, when the file is used up.
    """

    texts: tuple[str, ...]
    usable: tuple[int, ...]
    seed: int
    prompts_per_round: int
    responses_per_prompt: int
    shard_prompts: int
    rounds: int | None
    repeat: bool

    def __post_init__(self) -> None:
        needed = (self.rounds or 1) * self.prompts_per_round
        if not self.usable:
            raise PromptsError(
                "data.prompts: no prompt is left to use; raise data.max_prompt_tokens or add shorter ones"
            )
        if not self.repeat and needed > len(self.usable):
            remedy = "set it to true, add prompts, or lower batch.rounds or batch.prompts_per_round"
            there = f"{needed} prompts are needed and {len(self.usable)} can be used"
            raise PromptsError(bad_value("data.repeat", False, f"{there}; {remedy}"))

    @property
    def round_count(self) -> int | None:
        """Rounds that the prompts and the plan allow; None: no limit."""
        if self.repeat:
            return self.rounds
        there = len(self.usable) // self.prompts_per_round
        return there if self.rounds is None else self.rounds

    def prompts(self, first: int, stop: int) -> frozenset[int]:
        """Return the indices of the prompts of rounds `first` to `stop - 1`."""
        size, count = self.prompts_per_round, len(self.usable)
        places = np.arange(first * size, stop * size)
        found: set[int] = set()
        for number in range(first * size // count, -(-stop * size // count)):
            order = _order(self.seed, number, count)
            found.update(order[places[places // count == number] % count].tolist())
        return frozenset(self.usable[place] for place in found)

    def round(self, number: int) -> tuple[Shard, ...]:
        """Return the shards of one round, in canonical order."""
        size, first = self.prompts_per_round, number * self.prompts_per_round
        refs = [self._ref(position) for position in range(first, first + size)]
        parts = [refs[start : start + self.shard_prompts] for start in range(0, size, self.shard_prompts)]
        return tuple(
            Shard(number, index, tuple(part), self.seed, self.responses_per_prompt) for index, part in enumerate(parts)
        )

    def _ref(self, position: int) -> PromptRef:
        pass_number, place = divmod(position, len(self.usable))
        index = self.usable[int(_order(self.seed, pass_number, len(self.usable))[place])]
        return PromptRef(index, pass_number, self.texts[index])
