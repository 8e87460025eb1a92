"""Which tensors the reference makes one parameter where the files do not hold them apart: embedding tables and heads.

`from_pretrained` of `transformers` 5 ties those names only whose tensor is absent, or equal; the language model's own
`tie_word_embeddings` says whether it ties at all, but T5 always does.
"""

from __future__ import annotations

from typing import Any

LANGUAGE = "language_model."
_LANGUAGES = {  # the source first, and whether a configuration that says nothing ties
    "opt": (("model.decoder.embed_tokens.weight", "lm_head.weight"), True),
    "llama": (("model.embed_tokens.weight", "lm_head.weight"), False),
    "t5": (("shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"), True),
}
_WRITER = (
    ("embeddings.word_embeddings.weight", "cls.predictions.decoder.weight"),
    ("cls.predictions.bias", "cls.predictions.decoder.bias"),
)


def groups(config: dict[str, Any]) -> tuple[tuple[str, ...], ...]:
    """Names of the tensors that are tied to the first of them."""
    text = config.get("text_config") or {}
    kind = text.get("model_type", "opt")
    names, usual = _LANGUAGES.get(kind, ((), False))
    if kind != "t5" and not text.get("tie_word_embeddings", usual):
        return _WRITER
    return (tuple(LANGUAGE + name for name in names), *_WRITER)
