"""What other libraries say of a file that they cannot use, as one sentence."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from blip2_export.read.checkpoint import CheckpointError


@contextmanager
def in_one_sentence(said: str) -> Iterator[None]:
    """For calls into `transformers` and `tokenizers`, which raise whatever a file makes them trip over."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(f"{said} ({first_line(error)})") from error
    except BaseException as error:  # a panic in Rust is no `Exception`
        if type(error).__name__ != "PanicException":
            raise
        raise CheckpointError(f"{said} ({first_line(error)})") from None


def first_line(error: BaseException) -> str:
    """At most 200 characters of what an error says, without its line breaks."""
    line = " ".join(str(error).split()) or type(error).__name__
    line = f"no `{error.args[0]}`" if isinstance(error, KeyError) and error.args else line
    return line if len(line) <= 200 else f"{line[:199]}…"
