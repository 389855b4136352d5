"""Workloads: one folder each, with its suite file, its data and its model."""
