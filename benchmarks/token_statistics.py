"""Token statistics from logits, forward and backward, against the naive way.

Figures are the naive time over ours, for the forward pass alone and with the dense gradient by the logits.
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
from ray_probe.core.policy import sampling
from ray_probe.core.policy.features import DEFAULT_FEATURES
from ray_probe.core.policy.logits import SamplingRule
from ray_probe.core.policy.token_statistics import token_statistics

CAP = 64
NAIVE_PEAK_TOKENS = 256
PEAK_TOKENS = (256, 1024)
CHUNKS = (18, 19, 20, 21, 22)
Case = dict[str, Any]


def ours(logits_TV: Tensor, tokens_T: Tensor, top_p: float, backward: bool) -> object:
    """Score with our token statistics."""
    logits = logits_TV.detach().requires_grad_(backward)
    rows_T = torch.arange(len(tokens_T), device=tokens_T.device)
    rule = SamplingRule(logit_data.TEMPERATURE, top_p)
    statistics = token_statistics(logits, rows_T, tokens_T, rows_T, rule, CAP, DEFAULT_FEATURES)
    if backward:
        (0.3 * statistics.log_q_T.sum() + statistics.entropy_T.sum()).backward()
    return statistics, logits.grad


def reference(logits_TV: Tensor, tokens_T: Tensor, top_p: float, backward: bool) -> object:
    """Score in the naive way."""
    logits = logits_TV.detach().requires_grad_(backward)
    position_T = torch.arange(len(tokens_T), device=tokens_T.device)
    result = naive.statistics(logits, tokens_T, position_T, logit_data.TEMPERATURE, top_p, CAP)
    if backward:
        (0.3 * result[0].sum() + result[1].sum()).backward()
    return result, logits.grad


WAYS: dict[str, Callable[[Tensor, Tensor, float, bool], object]] = {"naive": reference, "ours": ours}


def timed(kind: str, vocabulary: int, top_p: float, options: Any) -> Case:
    """Time one case; return seconds and ratios."""
    tokens = options.tokens or (256 if vocabulary < 100_000 or kind == "llm" else 64)
    logits_TV = logit_data.logits(kind, tokens, vocabulary).to(options.device)
    tokens_T = logit_data.sampled(logits_TV, top_p)
    variants = {
        f"{way} {what}": lambda run=run, backward=backward: run(logits_TV, tokens_T, top_p, backward)
        for way, run in WAYS.items()
        for what, backward in (("forward", False), ("both", True))
    }
    seconds = interleaved(variants, options.rounds, options.device)
    speed = {what: ratio(seconds[f"naive {what}"], seconds[f"ours {what}"]) for what in ("forward", "both")}
    per_logit = {name: 1e9 * min(values) / logits_TV.numel() for name, values in seconds.items()}
    case = {"kind": kind, "vocabulary": vocabulary, "top_p": top_p, "tokens": tokens}
    print(
        f"  {kind:5s} V={vocabulary:<7d} top_p={top_p:<5g} T={tokens:<5d} forward x{shown(speed['forward'])}  "
        f"with gradient x{shown(speed['both'])}  ours {per_logit['ours forward']:.1f} / {per_logit['ours both']:.1f} "
        f"ns a logit, naive {per_logit['naive forward']:.0f} / {per_logit['naive both']:.0f}"
    )
    return case | {"ratio": speed, "least_ns_per_logit": per_logit, "seconds": seconds}


def chunk_sizes(options: Any) -> list[Case]:
    """Time the forward pass by the size of a chunk of rows, over the default's time."""
    found, default = [], sampling.CHUNK_ELEMENTS
    sizes = [1 << bits for bits in CHUNKS]
    for kind, vocabulary in (("llm", 32_000), ("llm", 151_936), ("flat", 151_936)):
        logits_TV = logit_data.logits(kind, 64, vocabulary).to(options.device)
        tokens_T = logit_data.sampled(logits_TV, 0.95)

        def run(size: int, logits_TV: Tensor = logits_TV, tokens_T: Tensor = tokens_T) -> object:
            sampling.CHUNK_ELEMENTS = size
            return ours(logits_TV, tokens_T, 0.95, False)

        variants = {str(size): lambda size=size, run=run: run(size) for size in sizes}
        seconds = interleaved(variants, options.rounds, options.device)
        sampling.CHUNK_ELEMENTS = default
        over = {size: ratio(values, seconds[str(default)]) for size, values in seconds.items()}
        line = "  ".join(f"2^{int(size).bit_length() - 1}: {value['median']:.2f}" for size, value in over.items())
        print(f"  {kind:5s} V={vocabulary:<7d} time over the default's by logits in a chunk   {line}")
        found.append({"kind": kind, "vocabulary": vocabulary, "default": default, "time_over_default": over})
    return found


def peaks(options: Any) -> list[Case]:
    """Measure peak memory beyond the logits, each case in its own process."""
    found = []
    for vocabulary in options.vocabulary:
        for top_p in options.top_p:
            for way, tokens, backward in (
                ("naive", NAIVE_PEAK_TOKENS, False),
                ("naive", NAIVE_PEAK_TOKENS, True),
                *(("ours", tokens, backward) for tokens in PEAK_TOKENS for backward in (False, True)),
            ):
                case = {"way": way, "vocabulary": vocabulary, "top_p": top_p, "tokens": tokens, "backward": backward}
                arguments = ["--device", options.device, "--threads", str(options.threads)]
                found.append(case | {"bytes": peak_in_fresh_process("benchmarks.token_statistics", arguments, case)})
                own = 4 * tokens * vocabulary * backward
                print(
                    f"  {way:5s} V={vocabulary:<7d} top_p={top_p:<5g} T={tokens:<5d} "
                    f"{'with gradient' if backward else 'forward':13s} peak {found[-1]['bytes'] / MEGABYTE:8.1f} MB"
                    + (f", {(found[-1]['bytes'] - own) / MEGABYTE:.1f} beyond the gradient" if backward else "")
                )
    return found


def main(arguments: list[str] | None = None) -> None:
    """Measure, print, save."""
    options = parser(__doc__, rounds=5)
    options.add_argument("--kinds", nargs="+", default=list(logit_data.KINDS), choices=logit_data.KINDS)
    options.add_argument("--tokens", type=int, default=None)
    chosen = options.parse_args(arguments or [])
    torch.set_num_threads(chosen.threads)
    if chosen.peak:
        case = json.loads(chosen.peak)
        logits_TV = logit_data.logits("llm", case["tokens"], case["vocabulary"]).to(chosen.device)
        tokens_T = logit_data.sampled(logits_TV[:1], case["top_p"]).expand(case["tokens"]).contiguous()
        run, rest = WAYS[case["way"]], (case["top_p"], case["backward"])
        run(logits_TV[:1], tokens_T[:1], *rest)
        print(peak_bytes(lambda: run(logits_TV, tokens_T, *rest), chosen.device))
        return
    cases = [timed(k, v, p, chosen) for v in chosen.vocabulary for k in chosen.kinds for p in chosen.top_p]
    figures = {"cases": cases, "chunks": chunk_sizes(chosen), "peaks": peaks(chosen)}
    save_for("token_statistics", chosen, {"seed": logit_data.SEED} | figures)


if __name__ == "__main__":
    main(sys.argv[1:])
