"""The fused head, forward and backward, in units of the bare matrix product.

It is compared with the naive way (all logits, naive statistics, autograd) and with our statistics on all logits.
Gradients go to hidden states and weight; the weight's gradient is added to an existing table.
"""

import json
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks import logit_data, naive
from benchmarks.measure import MEGABYTE, interleaved, parser, peak_bytes, peak_in_fresh_process, ratio, shown
from benchmarks.saving import save_for
from ray_probe.core.policy.features import DEFAULT_FEATURES
from ray_probe.core.policy.fused_head import fused_token_statistics
from ray_probe.core.policy.lm_head import Head
from ray_probe.core.policy.logits import SamplingRule
from ray_probe.core.policy.token_statistics import token_statistics

CAP = 64
NAIVE_PEAK_TOKENS = 256
PEAK_TOKENS = (256, 1024)
Case = dict[str, Any]


class Problem:
    """Hidden states, a weight with a table for its gradient, and tokens."""

    def __init__(self, case: Case, device: str) -> None:
        hidden_TD, weight_VD = logit_data.hidden_and_weight(case["tokens"], case["vocabulary"], case["hidden"])
        dtype = getattr(torch, case["dtype"])
        self.hidden_TD = hidden_TD.to(device, dtype).requires_grad_()
        self.weight_VD = weight_VD.to(device, dtype).requires_grad_()
        self.sum_VD = torch.zeros(self.weight_VD.shape, device=device)
        self.position_T = torch.arange(case["tokens"], device=device)
        self.rule = SamplingRule(logit_data.TEMPERATURE, case["top_p"])
        blocks = self.hidden_TD.detach().split(16)
        scored = (rows_ND @ self.weight_VD.detach().t() for rows_ND in blocks)
        self.tokens_T = torch.cat([logit_data.sampled(logits_NV, case["top_p"]) for logits_NV in scored])
        self.logits_TV: Tensor | None = None

    def gemm(self) -> None:
        """Compute the bare product into an existing table."""
        hidden_TD, weight_VD = self.hidden_TD.detach(), self.weight_VD.detach()
        if self.logits_TV is None:
            self.logits_TV = torch.empty(len(hidden_TD), len(weight_VD), dtype=hidden_TD.dtype, device=hidden_TD.device)
        torch.mm(hidden_TD, weight_VD.t(), out=self.logits_TV)

    def naive(self) -> None:
        """Score all logits by the definitions, with autograd."""
        logits_TV = self.hidden_TD @ self.weight_VD.t()
        temperature, top_p = self.rule.temperature, self.rule.top_p
        self._backward(*naive.statistics(logits_TV, self.tokens_T, self.position_T, temperature, top_p, CAP)[:2])

    def logits(self) -> None:
        """Compute all logits, then our statistics."""
        logits_TV = self.hidden_TD @ self.weight_VD.t()
        arguments = (self.position_T, self.tokens_T, self.position_T, self.rule, CAP, DEFAULT_FEATURES)
        statistics = token_statistics(logits_TV, *arguments)
        self._backward(statistics.log_q_T, statistics.entropy_T)

    def fused(self) -> None:
        """Score with the fused head, forward and backward."""
        self.weight_VD.grad_dtype, self.weight_VD.grad = self.sum_VD.dtype, self.sum_VD
        head = Head(self.weight_VD, accumulate_into_grad=True)
        arguments = (self.tokens_T, self.position_T, self.rule, CAP, DEFAULT_FEATURES)
        statistics = fused_token_statistics(self.hidden_TD, head, *arguments)
        self._backward(statistics.log_q_T, statistics.entropy_T)

    def scoring(self) -> None:
        """Score with the fused head without graph."""
        with torch.no_grad():
            head, arguments = Head(self.weight_VD), (self.tokens_T, self.position_T, self.rule, CAP, DEFAULT_FEATURES)
            fused_token_statistics(self.hidden_TD, head, *arguments)

    def _backward(self, log_q_T: Tensor, entropy_T: Tensor) -> None:
        (0.3 * log_q_T.sum() + entropy_T.sum()).backward()
        self.hidden_TD.grad = None
        if self.weight_VD.grad is not self.sum_VD:
            assert self.weight_VD.grad is not None
            self.sum_VD += self.weight_VD.grad
        self.weight_VD.grad, self.weight_VD.grad_dtype = None, self.weight_VD.dtype

    def ways(self) -> dict[str, Callable[[], None]]:
        """Return the variants to time, by name."""
        names = ("gemm", "scoring", "fused", "logits", "naive")
        return {name: getattr(self, name) for name in names}


def timed(case: Case, options: Any) -> Case:
    """Time one case; return seconds and ratios."""
    ways = Problem(case, options.device).ways()
    chosen = {name: way for name, way in ways.items() if name not in options.without}
    seconds = interleaved(chosen, options.rounds, options.device)
    units = {name: ratio(values, seconds["gemm"]) for name, values in seconds.items()}
    speed = {name: ratio(seconds["naive"], values) for name, values in seconds.items()} if "naive" in seconds else {}
    flops = 2.0 * case["tokens"] * case["vocabulary"] * case["hidden"]
    print(
        f"  V={case['vocabulary']:<7d} D={case['hidden']} T={case['tokens']} top_p={case['top_p']:<5g} fused "
        f"{shown(units['fused'], 2)} bare products ({flops / min(seconds['gemm']) / 1e9:.0f} GFLOP/s), forward alone "
        f"{shown(units['scoring'], 2)}" + (f", naive over fused x{shown(speed['fused'])}" if speed else "")
    )
    return case | {"in_products": units, "naive_over": speed, "seconds": seconds}


def peaks(options: Any) -> list[Case]:
    """Measure peak memory beyond the inputs, each case in its own process."""
    found = []
    for vocabulary in options.vocabulary:
        for top_p in options.top_p:
            naive_tokens = () if "naive" in options.without else (("naive", NAIVE_PEAK_TOKENS),)
            for way, tokens in (*naive_tokens, *(("fused", tokens) for tokens in options.peak_tokens)):
                case = _case(options, vocabulary, top_p) | {"way": way, "tokens": tokens}
                arguments = ["--device", options.device, "--threads", str(options.threads)]
                found.append(case | {"bytes": peak_in_fresh_process("benchmarks.fused_head", arguments, case)})
                peak = found[-1]["bytes"] / MEGABYTE
                print(f"  {way:5s} V={vocabulary:<7d} top_p={top_p:<5g} T={tokens:<5d} peak {peak:8.1f} MB")
    return found


def _case(options: Any, vocabulary: int, top_p: float) -> Case:
    sizes = {"tokens": options.tokens, "hidden": options.hidden, "dtype": options.dtype}
    return {"vocabulary": vocabulary, "top_p": top_p} | sizes


def main(arguments: list[str] | None = None) -> None:
    """Measure, print, save."""
    options = parser(__doc__, rounds=5)
    options.add_argument("--tokens", type=int, default=256)
    options.add_argument("--hidden", type=int, default=512)
    options.add_argument("--dtype", default="float32")
    options.add_argument("--without", nargs="*", default=[], help="variants to leave out: naive, logits")
    options.add_argument("--peak-tokens", type=int, nargs="+", default=list(PEAK_TOKENS))
    chosen = options.parse_args(arguments or [])
    torch.set_num_threads(chosen.threads)
    if chosen.peak:
        case = json.loads(chosen.peak)
        problem = Problem(case, chosen.device)
        print(peak_bytes(problem.ways()[case["way"]], chosen.device))
        return
    cases = [timed(_case(chosen, v, p), chosen) for v in chosen.vocabulary for p in chosen.top_p]
    save_for("fused_head", chosen, {"seed": logit_data.SEED, "cases": cases, "peaks": peaks(chosen)})


if __name__ == "__main__":
    main(sys.argv[1:])
