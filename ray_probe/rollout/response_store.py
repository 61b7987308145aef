"""Responses of a checkpoint in the middle of a chain, kept for its next step.

A file holds the token ids of one shard's responses, readable by its owner alone. A response follows from its seed, so
a file that is not there, damaged or of another policy costs the time to sample again and nothing else.
"""

import hashlib
import io
import json
import logging
import zipfile
from pathlib import Path

import numpy as np

from ray_probe.config.schema import ProbeConfig
from ray_probe.model.sequences import BatchedSequences, pack_sequences
from ray_probe.run.comparison.chain import responses_of
from ray_probe.run.preparation.plan import Shard
from ray_probe.run.preparation.prepared import CheckpointId
from ray_probe.system.files import write_atomically

logger = logging.getLogger("ray_probe")


def policy_key(config: ProbeConfig, checkpoint: CheckpointId) -> str:
    """Return a hash of what fixes responses besides prompts and seeds."""
    generation = config.generation
    parts = [
        checkpoint.fingerprint, checkpoint.adapter_fingerprint, config.model.dtype, generation.temperature,
        generation.top_p, generation.max_new_tokens, generation.eos_token_ids, generation.gen_batch_size,
    ]  # fmt: skip
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


class ResponseStore:
    """Reads the responses of A that the step before kept, and keeps those of B.

    Args:
        before: directory of the run that kept A's responses; None: none did.
        own: directory of this run, where B's are kept; None: they are not.
        keys: `policy_key` of A and of B.
    """

    def __init__(self, before: Path | None, own: Path | None, keys: tuple[str, str]) -> None:
        self._before, self._own, self._keys = before, own, keys

    def load(self, shard: Shard, prompts: list[list[int]], side: int) -> BatchedSequences | None:
        """Return A's responses of a shard; None where they are not kept.

        Args:
            shard: the shard.
            prompts: token ids of its prompts; those of other prompts are not used.
            side: of A in the seeds.
        """
        if self._before is None:
            return None
        path = responses_of(self._before) / _name(shard)
        try:
            with np.load(path, allow_pickle=False) as kept:
                key, lengths_BG, tokens_T, log_q_T = (kept[name] for name in ("key", "lengths", "tokens", "log_q"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            logger.warning("%s: cannot be read (%s); its responses are sampled again", path, error)
            return None
        if str(key) != _key(self._keys[0], shard, prompts, side):
            return None
        ends = np.cumsum(lengths_BG)[:-1]
        tokens, log_q = (iter(np.split(values_T, ends)) for values_T in (tokens_T, log_q_T))
        groups = [[next(tokens).tolist() for _ in row] for row in lengths_BG]
        return pack_sequences(prompts, groups, [[next(log_q) for _ in row] for row in lengths_BG])

    def keep(self, shard: Shard, sequences: BatchedSequences, side: int) -> None:
        """Keep B's responses of a shard, where the run's directory can be reached.

        Args:
            shard: the shard.
            sequences: its responses.
            side: of B in the seeds.

        Raises:
            OutputError: the file cannot be written.
        """
        if self._own is None or not responses_of(self._own).parent.is_dir():
            return
        assert sequences.sample_logprobs is not None
        groups, group = sequences.shape
        prompts = [sequences.tokens(b, 0)[0].tolist() for b in range(groups)]
        stream = io.BytesIO()
        np.savez(
            stream,
            key=np.array(_key(self._keys[1], shard, prompts, side)),
            lengths=np.array(sequences.gen_lens),
            tokens=np.concatenate([sequences.tokens(b, g)[1].numpy() for b in range(groups) for g in range(group)]),
            log_q=np.concatenate([row for rows in sequences.sample_logprobs for row in rows]),
        )
        folder = responses_of(self._own)
        folder.mkdir(mode=0o700, exist_ok=True)
        write_atomically(folder / _name(shard), stream.getvalue(), private=True)


def _key(policy: str, shard: Shard, prompts: list[list[int]], side: int) -> str:
    """Return a hash of what fixes a shard's responses: policy, prompts, seeds."""
    return hashlib.sha256(json.dumps([policy, prompts, shard.response_seeds(side)]).encode()).hexdigest()


def _name(shard: Shard) -> str:
    return f"{shard.round:06d}-{shard.index:06d}.npz"
