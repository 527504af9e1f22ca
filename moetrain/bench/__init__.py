"""Benchmarks of our operators against named baselines. The tables of `moetrain bench` come from here.

What the command line reads (`settings`, `catalog`, `results`, `report`, `runner`) needs no torch; what measures runs in
processes of its own (`worker`), one for each number of threads. A new benchmark: a function that returns a
:class:`moetrain.bench.problem.Problem`, and its line in :data:`moetrain.bench.catalog.BENCHMARKS`.
"""
