"""Run all benchmarks: `python -m benchmarks`."""

from benchmarks import actor_memory, baselines, ledger, service_latency

for benchmark in (actor_memory, baselines, ledger, service_latency):
    print(f"== {benchmark.__name__.removeprefix('benchmarks.')}: {(benchmark.__doc__ or '').splitlines()[0]}")
    benchmark.main()
