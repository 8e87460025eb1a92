"""Nothing in the files is lost without a word: tensors that no graph asked for are named."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from fnmatch import fnmatchcase

from blip2_export.read.checkpoint import Checkpoint, CheckpointError

# Buffers of former versions, which the reference too computes anew or leaves aside.
_BUFFERS = re.compile(
    r"(^|\.)position_ids|rotary_emb\.inv_freq|masked_bias|decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight"
)


def check(checkpoint: Checkpoint, ignored: Sequence[str]) -> None:
    """Once everything is built. `ignored`: shell patterns of names that may be left out."""
    left = checkpoint.untouched()
    known = [name for name in left if _BUFFERS.search(name) or any(fnmatchcase(name, one) for one in ignored)]
    strange = sorted(set(left).difference(known))
    if strange:
        raise CheckpointError(
            f"{checkpoint.folder}: it holds {_count(strange)}, which no part of a model of this configuration is; correct that, "
            "or leave out what may be lost with --ignore-tensors PATTERN"
        )
    if known:
        print(f"warning: {checkpoint.folder}: {_count(sorted(known))} left out", file=sys.stderr)


def _count(names: list[str]) -> str:
    return f"`{names[0]}`" + (f" and {len(names) - 1} more" if len(names) > 1 else "")
