"""Bundles in the engine against their checkpoints in `transformers`, and the random checkpoints for it."""
