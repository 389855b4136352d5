"""FLOP accounting: what a model's passes cost, with and without frozen neurons."""
