"""Benchmark harness: what freezing neurons saves in training, and what it costs in accuracy."""
