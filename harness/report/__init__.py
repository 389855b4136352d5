"""Reports: one table model from parquet, rendered for a terminal or as JSON."""
