"""Fetches a checkpoint from the Hugging Face hub: an id goes in, a folder in `huggingface_hub`'s own cache comes out.

Which files are needed is decided from their names and the weights' index; what they say is not looked at here.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2
from huggingface_hub import (
    HfApi,
    RepoFile,
    ResolvedRevision,
    constants,
    get_cached_repo_tree,
    hf_hub_download,
    snapshot_download,
)
from huggingface_hub.errors import (
    CachedRepoTreeNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    RevisionResolutionError,
)

from blip2_export.read import lora
from blip2_export.read.checkpoint import CheckpointError, shards, weights_name

_ID = re.compile(r"(?!.*(--|\.\.))\w[\w.-]*/\w[\w.-]*(?<![.-])")
_CONFIGS = ("config.json", "preprocessor_config.json", "processor_config.json")
_TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "spiece.model",
    "tokenizer.model",
)
_TOKENIZER_FOLDERS = ("", "tokenizer/", "qformer_tokenizer/")


def locate(checkpoint: str, revision: str | None = None) -> Path:
    """The folder of a checkpoint: the path itself or, where there is none of that name, what the hub has under the id."""
    path = Path(checkpoint)
    if not path.exists() and _ID.fullmatch(checkpoint):
        return fetch(checkpoint, revision)
    if revision is not None:
        raise CheckpointError(f"{checkpoint}: a revision is chosen of an id on the hub (owner/name), not of a folder")
    return path


def fetch(repo: str, revision: str | None = None) -> Path:
    """Downloads what a conversion reads. Complete files are kept and not fetched again, whatever happens to the others."""
    with _in_one_sentence(repo, revision):
        commit = HfApi().resolve_revision(repo, revision=revision)
        try:
            sizes = _sizes(repo, commit)
        except (httpx2.TransportError, OfflineModeIsEnabled) as error:
            return _kept(repo, commit, error)
        files = _needed(repo, commit, sizes)
        total = sum(sizes[file] for file in files)
        print(f"{repo}: {len(files)} files, {total / 1e9:.2f} GB, kept in {constants.HF_HUB_CACHE}", file=sys.stderr)
        return Path(snapshot_download(repo, revision=commit, allow_patterns=files))


def _sizes(repo: str, commit: ResolvedRevision) -> dict[str, int]:
    """Every file of the commit with its size in bytes, from the hub where no earlier run has asked for it."""
    try:
        files = get_cached_repo_tree(repo, revision=commit)
    except CachedRepoTreeNotFoundError:
        entries = HfApi().list_repo_tree(repo, recursive=True, revision=commit.resolved)
        files = [entry for entry in entries if isinstance(entry, RepoFile)]
    return {file.path: file.size for file in files}


def _kept(repo: str, commit: ResolvedRevision, unreachable: Exception) -> Path:
    """What another program left in the cache, without a list of what belongs to it."""
    try:
        return Path(snapshot_download(repo, revision=commit, local_files_only=True))
    except LocalEntryNotFoundError as error:
        raise error from unreachable


def _needed(repo: str, commit: ResolvedRevision, there: Collection[str]) -> list[str]:
    """Configurations, tokenizers, the one set of weights that the reference would choose, and an adapter with or without them."""
    wanted = {*_CONFIGS, *(folder + name for folder in _TOKENIZER_FOLDERS for name in _TOKENIZER)}
    weights = weights_name(there)
    if lora.CONFIG in there:
        wanted |= {lora.CONFIG, weights_name(there, lora.WEIGHTS) or lora.CONFIG}
        if "config.json" not in there:
            return sorted(wanted.intersection(there))
    if "config.json" not in there or weights is None:
        missing = "config.json" if "config.json" not in there else "weights (safetensors or .bin)"
        raise CheckpointError(f"{repo}: has no {missing}, so it is not a checkpoint in the format of transformers")
    wanted.add(weights)
    if weights.endswith(".index.json"):
        listed = set(shards(Path(hf_hub_download(repo, weights, revision=commit.resolved))).values())
        lacking = sorted(listed.difference(there))
        if lacking:
            raise CheckpointError(f"{repo}: its index lists {lacking[0]}, which is not there ({len(lacking)} in all)")
        wanted |= listed
    return sorted(wanted.intersection(there))


@contextmanager
def _in_one_sentence(repo: str, revision: str | None) -> Iterator[None]:
    try:
        yield
    except CheckpointError:
        raise
    except (RevisionResolutionError, httpx2.HTTPError, OSError, ValueError) as error:
        raise CheckpointError(f"{repo}: {_sentence(error, repo, revision)}") from error


def _sentence(error: BaseException, repo: str, revision: str | None) -> str:
    again = "the same command goes on with the files that are missing"
    login = "log in with `hf auth login` or set HF_TOKEN"
    if isinstance(error, (RevisionResolutionError, LocalEntryNotFoundError)) and error.__cause__ is not None:
        error = error.__cause__
    match error:
        case GatedRepoError():
            return f"access is gated; ask for it at {constants.ENDPOINT}/{repo}, then {login}"
        case RepositoryNotFoundError():
            return f"no folder here, and no model on the hub has this id, or it is private (then {login})"
        case RevisionNotFoundError():
            return f"the hub has no revision `{revision}` of it"
        case HfHubHTTPError() if error.response.status_code in (401, 403):
            return f"the hub refuses access ({error.response.status_code}); {login}"
        case HfHubHTTPError():
            return f"the hub answers with status {error.response.status_code}; try again later, {again}"
        case OfflineModeIsEnabled() | LocalEntryNotFoundError():
            return "not all of it is in the cache, and HF_HUB_OFFLINE forbids to fetch the rest"
        case httpx2.ConnectError() | httpx2.ConnectTimeout() | httpx2.ProxyError():
            return f"no folder here, and {constants.ENDPOINT} cannot be reached ({error}); with a connection, {again}"
        case httpx2.HTTPError():
            return f"the download broke off ({error}); {again}"
        case _:
            return f"cannot be fetched ({' '.join(str(error).split())}); {again}"
