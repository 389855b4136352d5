"""What is asked for: suite files, sweeps, methods' parameters, and the trials' keys."""
