"""Measurements of what loraq promises: one question a module, `python -m benchmarks.…`."""
