"""Benchmarks: `python -m tests.bench.NAME`, results under `results/`."""
