"""Measurements of what loraq promises: one question a module, started as `python -m benchmarks.…`."""
