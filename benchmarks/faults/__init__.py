"""Injected faults, one module for each kind; `benchmarks.reliability` runs them and counts what happened."""
