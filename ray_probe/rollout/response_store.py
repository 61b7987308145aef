"""Responses of a checkpoint in a chain or series, kept for its next measurement.

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
from ray_probe.sequence_processor import SequenceProcessor
from ray_probe.system.files import write_atomically

logger = logging.getLogger("ray_probe")
Seeds = list[list[tuple[int, ...]]]


def policy_key(config: ProbeConfig, checkpoint: CheckpointId) -> str:
    """Return a hash of what fixes responses besides prompts and seeds."""
    generation = config.generation
    parts = [
        checkpoint.fingerprint, checkpoint.adapter_fingerprint, config.model.dtype, generation.temperature,
        generation.top_p, generation.max_new_tokens, generation.eos_token_ids, generation.gen_batch_size,
    ]  # fmt: skip
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


class ResponseStore:
    """Reads responses that the measurement before kept, and keeps those of this one.

    A comparison reads those of A and keeps those of B; a gradient reads and keeps those of its checkpoint.

    Args:
        before: directory of the run that kept responses; None: none did.
        own: directory of this run, where they are kept; None: they are not.
        keys: `policy_key` of those that are read, and of those that are kept.
    """

    def __init__(self, before: Path | None, own: Path | None, keys: tuple[str, str]) -> None:
        self._before, self._own, self._keys = before, own, keys

    def load(self, shard: Shard, prompts: list[list[int]], seeds: Seeds) -> BatchedSequences | None:
        """Return kept responses of a shard; None where they are not kept.

        Args:
            shard: the shard.
            prompts: token ids of its prompts; those of other prompts are not used.
            seeds: of the responses [b][g]; those of other seeds are not used.
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
        if str(key) != _key(self._keys[0], prompts, seeds):
            return None
        ends = np.cumsum(lengths_BG)[:-1]
        tokens, log_q = (iter(np.split(values_T, ends)) for values_T in (tokens_T, log_q_T))
        groups = [[next(tokens).tolist() for _ in row] for row in lengths_BG]
        return pack_sequences(prompts, groups, [[next(log_q) for _ in row] for row in lengths_BG])

    def keep(self, shard: Shard, sequences: BatchedSequences, seeds: Seeds) -> None:
        """Keep responses of a shard, where the run's directory can be reached.

        Args:
            shard: the shard.
            sequences: its responses.
            seeds: of the responses [b][g].

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
            key=np.array(_key(self._keys[1], prompts, seeds)),
            lengths=np.array(sequences.gen_lens),
            tokens=np.concatenate([sequences.tokens(b, g)[1].numpy() for b in range(groups) for g in range(group)]),
            log_q=np.concatenate([row for rows in sequences.sample_logprobs for row in rows]),
        )
        folder = responses_of(self._own)
        folder.mkdir(mode=0o700, exist_ok=True)
        write_atomically(folder / _name(shard), stream.getvalue(), private=True)


class SharedResponses:
    """Samples a gradient's responses as comparisons of the same checkpoint do.

    A comparison with twice the responses a prompt has the same ones of the checkpoint, so each is sampled once.

    Args:
        store: has those that a comparison kept, and keeps them for the next one.
        side: of the checkpoint in the seeds.
    """

    def __init__(self, store: ResponseStore, side: int) -> None:
        self._store, self._side = store, side

    def sampled(self, processor: SequenceProcessor, shard: Shard) -> BatchedSequences:
        """Return the responses of a shard, from the store or from the policy."""
        texts, count = [ref.text for ref in shard.prompts], shard.responses_per_prompt
        seeds = shard.response_seeds(self._side, count)
        kept = self._store.load(shard, [processor.encode(text) for text in texts], seeds)
        sequences = processor.generate(texts, count, seeds) if kept is None else kept
        self._store.keep(shard, sequences, seeds)
        return sequences


def _key(policy: str, prompts: list[list[int]], seeds: Seeds) -> str:
    """Return a hash of what fixes a shard's responses: policy, prompts, seeds."""
    return hashlib.sha256(json.dumps([policy, prompts, seeds]).encode()).hexdigest()


def _name(shard: Shard) -> str:
    return f"{shard.round:06d}-{shard.index:06d}.npz"
