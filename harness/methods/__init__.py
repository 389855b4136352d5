"""Training methods at work in a trial; their parameters are in `harness.suite.method_specs`."""
