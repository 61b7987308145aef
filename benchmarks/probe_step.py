"""A probe step (statistics, fit, gradient) against naive teacher forcing.

The sequences are sampled beforehand. The naive step has one forward pass a sequence, whole [T, V] tables, and holds the
graphs of all sequences until the ridge is fitted. Ours has one pass (graphs held) or two (bounded memory). Both leave
each shard out of its own fit, so the gradients must agree.
"""

import json
import sys
from collections.abc import Callable, Sequence
from itertools import count
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from benchmarks import language_model, naive
from benchmarks.measure import MEGABYTE, interleaved, peak_bytes, peak_in_fresh_process, ratio, shown
from benchmarks.saving import save_for
from ray_probe.core.estimator.baselines import BaselineRule
from ray_probe.core.estimator.ridge import solve
from ray_probe.core.policy.features import DEFAULT_FEATURES
from ray_probe.fitter.fitter import Fitter
from ray_probe.gradient.shard_sum import GradientSum
from ray_probe.model.sequences import BatchedSequences, TokenRow
from ray_probe.probe_components import ProbeComponents
from ray_probe.rollout.rollout import Rollout
from ray_probe.run.preparation.plan import Plan, Shard
from ray_probe.sequence_processor import Seed, SequenceProcessor

SHARD = 8  # sequences of a shard
RIDGE = 1e-3
PEAKS = {"naive": (8, 16), "one": (8, 32), "two": (8, 32, 128)}
Case = dict[str, Any]


class Replayed(SequenceProcessor):
    """Samples each shard once, and returns the same sequences afterwards."""

    def generate(
        self, prompts: Sequence[str], responses_per_prompt: int, seeds: Sequence[Sequence[Seed]], decode: bool = False
    ) -> BatchedSequences:
        """Do as `SequenceProcessor.generate`."""
        known: dict[str, BatchedSequences] = self.__dict__.setdefault("known", {})
        if prompts[0] not in known:
            known[prompts[0]] = super().generate(prompts, responses_per_prompt, seeds, decode)
        return known[prompts[0]]


class Problem:
    """A model, a rollout on it and a round of shards."""

    def __init__(
        self, size: language_model.Size, top_p: float, device: str, kind: type[SequenceProcessor] = Replayed,
        shard: int = SHARD, fit: str = "leave_one_out",
    ) -> None:  # fmt: skip
        self.size, self.top_p = size, top_p
        self.model: LlamaForCausalLM = language_model.model(size, device)
        settings = language_model.settings(size, top_p, tf_batch_size=SHARD)
        self.processor = kind(self.model, language_model.tokenizer(size.vocabulary), settings)
        self.rule = BaselineRule("regression", fit, RIDGE, 0.9, DEFAULT_FEATURES, size.new_tokens)  # type: ignore[arg-type]
        self.gradient = GradientSum(self.model, "all")
        self.rollout = Rollout(ProbeComponents(self.processor), self.gradient, self.rule, "benchmark", device)
        texts = tuple(language_model.prompts(size))
        self.shards = Plan(texts, tuple(range(len(texts))), 0, len(texts), 1, shard, 1, True).round(0)
        self._names = count()

    def rows(self) -> list[list[TokenRow]]:
        """Return prompt and response of every sequence, by shard."""
        return [self._rows(shard) for shard in self.shards]

    def _rows(self, shard: Shard) -> list[TokenRow]:
        texts = [ref.text for ref in shard.prompts]
        sequences = self.processor.generate(texts, 1, shard.response_seeds())
        return [sequences.tokens(b, 0) for b in range(len(texts))]

    def ours(self, passes: int) -> Rollout:
        """Run a step of the rollout and return it, with its summed gradient."""
        fitter, held = Fitter(self.rule, "benchmark"), self.size.responses * 10**6 if passes == 1 else 0
        self.rollout.begin(f"step {next(self._names)}")
        for shard in self.shards:
            self.rollout.acknowledge(shard, fitter.accept(self.rollout.collect(shard, held).delivery))
        fit = fitter.close_round(0, [shard.index for shard in self.shards]).for_broadcast()
        for shard in self.shards:
            self.rollout.accumulate(shard, fit)
        return self.rollout

    def naive(self, rows: list[list[TokenRow]]) -> None:
        """Run the naive step; its gradient goes to `.grad`."""
        self.model.zero_grad(set_to_none=True)
        held = [[self._statistics(row) for row in shard] for shard in rows]
        entropies = [[entropy_T.detach().cpu().double().numpy() for _, entropy_T, _ in shard] for shard in held]
        future = [[np.append(h[::-1].cumsum()[::-1][1:], 0.0) for h in shard] for shard in entropies]
        phi = [torch.cat([features_TD for *_, features_TD in shard]).cpu().double().numpy() for shard in held]
        loss = torch.zeros((), dtype=torch.float64, device=self.model.device)
        for place, shard in enumerate(held):
            mu_hat = phi[place] @ self._beta(phi, future, place)
            advantage = np.concatenate(future[place]) - mu_hat
            log_q = torch.cat([log_q_T for log_q_T, *_ in shard]).double()
            loss = loss + (torch.from_numpy(advantage).to(log_q.device) * log_q).sum()
            loss = loss + sum(entropy_T.double().sum() for _, entropy_T, _ in shard)
        loss.backward()

    def _statistics(self, row: TokenRow) -> tuple[Tensor, Tensor, Tensor]:
        prompt, response = (part.to(self.model.device) for part in row)
        logits_TV = self.model(torch.cat([prompt, response])[None]).logits[0, len(prompt) - 1 : -1]
        position_T, temperature = torch.arange(len(response), device=self.model.device), language_model.TEMPERATURE
        return naive.statistics(logits_TV, response, position_T, temperature, self.top_p, self.size.new_tokens)

    def _beta(self, phi: list[Any], future: list[list[Any]], own: int) -> Any:
        use = [place for place in range(len(phi)) if place != own or self.rule.fit != "leave_one_out"]
        if not use:
            return np.zeros(phi[own].shape[1])
        rows, target = np.concatenate([phi[k] for k in use]), np.concatenate([r for k in use for r in future[k]])
        return solve(rows.T @ rows, (rows.T @ target)[:, None], RIDGE)[:, 0]  # type: ignore[index]

    def gap(self, rows: list[list[TokenRow]]) -> dict[str, float]:
        """Return the relative L2 distances of our gradients from the naive one."""
        self.naive(rows)
        exact = torch.cat([p.grad.flatten() for p in self.model.parameters() if p.grad is not None]).cpu()
        size = self.gradient.layout.size
        found = {name: self.ours(passes).bucket(0, size) for name, passes in (("one", 1), ("two", 2))}
        return {
            name: float((torch.from_numpy(flat) - exact).norm() / exact.norm()) for name, flat in found.items()
        }  # fmt: skip


def timed(size: language_model.Size, top_p: float, options: Any) -> Case:
    """Time both sides; return seconds, ratios and the distance of the gradients."""
    problem = Problem(size, top_p, options.device)
    rows = problem.rows()
    gap = problem.gap(rows)
    variants: dict[str, Callable[[], object]] = {
        "naive": lambda: problem.naive(rows), "two": lambda: problem.ours(2), "one": lambda: problem.ours(1),
    }  # fmt: skip
    chosen = {name: variant for name, variant in variants.items() if name not in options.without}
    seconds = interleaved(chosen, options.rounds, options.device)
    speed = {name: ratio(seconds["naive"], seconds[name]) for name in ("two", "one") if "naive" in seconds}
    rate = {name: size.tokens / min(values) for name, values in seconds.items()}
    print(f"  top_p={top_p:g}: naive time over each, tokens/s, relative distance of the gradient from the naive one")
    for name in ("two", "one"):
        faster = f"x{shown(speed[name], 2)}" if speed else ""
        print(f"    {name} pass{'es' if name == 'two' else '  '} {faster:22s} {rate[name]:8.0f} {gap[name]:10.1e}")
    return {"top_p": top_p, "naive_over": speed, "tokens_per_s": rate, "gradient_gap": gap, "seconds": seconds}


def peak(case: Case, options: Any) -> int:
    """Measure the peak memory of one step above model and tokens."""
    problem = Problem(language_model.size_of(options, responses=case["responses"]), case["top_p"], options.device)
    rows = problem.rows()
    if case["way"] == "naive":
        return peak_bytes(lambda: problem.naive(rows), options.device)
    return peak_bytes(lambda: problem.ours({"one": 1, "two": 2}[case["way"]]), options.device)


def peaks(options: Any, arguments: list[str]) -> list[Case]:
    """Measure peak memory by number of sequences, each in its own process."""
    found = []
    for way, sizes in PEAKS.items():
        for responses in sizes if way not in options.without else ():
            case = {"way": way, "responses": responses, "top_p": 0.95}
            found.append(case | {"bytes": peak_in_fresh_process("benchmarks.probe_step", arguments, case)})
        mine = [case for case in found if case["way"] == way]
        if mine:
            growth = (mine[-1]["bytes"] - mine[0]["bytes"]) / (mine[-1]["responses"] - mine[0]["responses"])
            cells = "  ".join(f"{case['responses']}: {case['bytes'] / MEGABYTE:.0f}" for case in mine)
            print(f"  peak MB by sequences, {way:5s} {cells}  ({growth / MEGABYTE:.2f} MB a sequence)")
    return found


def main(arguments: list[str] | None = None) -> None:
    """Measure, print, save."""
    options = language_model.options_of(__doc__, rounds=5, responses=2 * SHARD)
    options.add_argument("--without", nargs="*", default=[], help="variants to leave out: naive")
    chosen = options.parse_args(arguments or [])
    torch.set_num_threads(chosen.threads)
    if chosen.peak:
        print(peak(json.loads(chosen.peak), chosen))
        return
    size = language_model.size_of(chosen)
    print(f"  {size}")
    cases = [timed(size, top_p, chosen) for top_p in chosen.top_p]
    found = peaks(chosen, arguments or [])
    save_for("probe_step", chosen, {"size": vars(size), "seed": language_model.SEED, "cases": cases, "peaks": found})


if __name__ == "__main__":
    main(sys.argv[1:])
