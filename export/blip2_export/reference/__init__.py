"""`transformers` as the reference, and the goldens that are recorded from it."""
