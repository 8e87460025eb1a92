"""Captions as they are learnt: in LAVIS' form, and none that says nothing."""

from __future__ import annotations

_MARKS = str.maketrans({mark: " " for mark in '.!"()*#:;~'})
_WORDS = 50
LONGEST = 2000  # characters; what is longer is no caption


def clean(caption: str) -> str:
    """LAVIS' form (`blip_processors.py`): lower case, punctuation to spaces, at most 50 words."""
    return " ".join(caption.lower().translate(_MARKS).split()[:_WORDS])


def says_something(caption: str) -> bool:
    """Whether there is something to learn from it."""
    return len(caption) <= LONGEST and bool(clean(caption))
