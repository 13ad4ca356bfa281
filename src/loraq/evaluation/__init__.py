"""Measure what quantization costs: metrics, and a small trained world to measure them in."""
