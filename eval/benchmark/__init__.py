"""Benchmarks: plan, run, collect, report. Imports no study."""
