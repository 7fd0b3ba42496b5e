"""Whole benchmarks: plan, run, collect, report. Imports no study."""
