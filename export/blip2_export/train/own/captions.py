"""Captions as they are learnt: in LAVIS' form."""

from __future__ import annotations

_MARKS = str.maketrans({mark: " " for mark in '.!"()*#:;~'})
_WORDS = 50
LONGEST = 2000  # characters; what is longer is no caption


def clean(caption: str) -> str:
    """LAVIS' form (`blip_processors.py`): lower case, punctuation to spaces, at most 50 words."""
    return " ".join(caption.lower().translate(_MARKS).split()[:_WORDS])
