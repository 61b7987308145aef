"""Run benchmarks, all or some: `python -m benchmarks [NAME ...] [--device cuda]`.

On a GPU only the benchmarks of the numerics run, which neither need nor import Ray.
"""

import argparse
import time
from importlib import import_module

NUMERICS = ("token_statistics", "fused_head", "chunk_sizes", "decoding", "probe_step", "end_to_end")
OTHERS = (
    "micro_batches", "actor_memory", "baselines", "callback_cost", "change", "comparison_cost", "ledger",
    "ray_messages", "scaling", "start_up", "service_latency", "http_latency",
)  # fmt: skip


def main() -> None:
    """Run the benchmarks one after the other in this process."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Run benchmarks, all or those named.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join((*NUMERICS, *OTHERS)))
    parser.add_argument("--device", default="cpu", help=f"cpu or cuda (then only {', '.join(NUMERICS)})")
    chosen = parser.parse_args()
    known = (*NUMERICS, *OTHERS) if chosen.device == "cpu" else NUMERICS
    if unknown := sorted(set(chosen.names) - set(known)):
        parser.error(f"NAME: got {', '.join(unknown)}; on {chosen.device} there are {', '.join(known)}")
    for name in chosen.names or known:
        benchmark = import_module(f"benchmarks.{name}")
        print(f"== {name}: {(benchmark.__doc__ or '').splitlines()[0]}")
        started = time.monotonic()
        benchmark.main(*([["--device", chosen.device]] if name in NUMERICS else []))
        print(f"   {name} took {time.monotonic() - started:.0f} s\n")


if __name__ == "__main__":
    main()
