"""Run all benchmarks: `python -m benchmarks`."""

from benchmarks import actor_memory, baselines, fused_head, ledger, service_latency, token_statistics

for benchmark in (token_statistics, fused_head, actor_memory, baselines, ledger, service_latency):
    print(f"== {benchmark.__name__.removeprefix('benchmarks.')}: {(benchmark.__doc__ or '').splitlines()[0]}")
    benchmark.main()
