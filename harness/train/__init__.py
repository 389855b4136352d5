"""One trial: model, optimizer and loop, resumed from its checkpoint to the bit."""
