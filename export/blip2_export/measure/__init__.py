"""The engine and `transformers` timed on the same work: pictures, prompts, number of tokens, threads."""
