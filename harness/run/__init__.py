"""From a suite to finished trials: what is to be run, who runs it, and what happens to it."""
