"""Tokenizers as the reference's own classes read them, and the `tokenizer.json` that a bundle gets of one."""

from __future__ import annotations

import json
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders

from blip2_export.read.checkpoint import CheckpointError, read_json
from blip2_export.read.guarded import in_one_sentence

_PIECES = ("spiece.model", "tokenizer.model")
_SLOW_FILES = (("vocab.json", "merges.txt"), ("vocab.txt",))
_JSON = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
QUESTION_FOLDER = "qformer_tokenizer"
_QUESTION_TOKENIZER = "qformer_tokenizer.json"
_QUESTIONS: dict[str, dict[str, Any]] = {  # as LAVIS' `blip2_t5_instruct.py` and `blip2.py` cut them
    "instructblip": {"max_tokens": 128, "truncation_side": "left", "reads": "prompt"},
    "blip-2": {"max_tokens": 32, "truncation_side": "right", "reads": "question"},
}
_SAMPLES = ("a photo of", "  Two dogs, 12 cats!", "Question: what's the naïve Ünï-code? Answer:")


def load(folder: Path) -> Any:
    """The reference's tokenizer of a folder, of the class that the folder asks for."""
    from transformers import AutoTokenizer, BertTokenizer, TokenizersBackend

    _check_files(folder)
    fast = _has_fast_tokenizer(folder)
    kind = BertTokenizer if not fast and (folder / "vocab.txt").is_file() else AutoTokenizer
    with in_one_sentence(f"{folder}: the tokenizer cannot be read"):
        if not fast or _settings(folder).get("tokenizer_class"):
            made = _loaded(kind, folder)
            made(_SAMPLES[0])  # some settings only fail here
            return made
        plain = _loaded(TokenizersBackend, folder)
        try:
            found = _loaded(kind, folder)
        except Exception:  # no model's folder, so that no class follows from config.json
            return plain
        if any(found(text).input_ids != plain(text).input_ids for text in _SAMPLES):
            raise CheckpointError(
                f"{folder}: no tokenizer_class in tokenizer_config.json, and as {type(found).__name__}, which the "
                "reference takes then, tokenizer.json reads texts differently; name its class there"
            )
        return found


def read(folder: Path) -> Tokenizer:
    """What `load` gives, in one file's worth: encodes and decodes as it does. It neither cuts nor fills up."""
    return backend(load(folder), folder)


def backend(made: Any, folder: Path) -> Tokenizer:
    """The part of a reference's tokenizer that a `tokenizer.json` holds, and its clean-up of decoded texts."""
    if not isinstance(getattr(made, "backend_tokenizer", None), Tokenizer):
        raise CheckpointError(f"{folder}: {type(made).__name__} has no form that a tokenizer.json can hold")
    with in_one_sentence(f"{folder}: the tokenizer cannot be read"):
        tokenizer = Tokenizer.from_str(made.backend_tokenizer.to_str())
    tokenizer.no_truncation()
    tokenizer.no_padding()
    if _cleans_up(made):
        fused = [part for part in (tokenizer.decoder, decoders.Fuse()) if part is not None]
        tokenizer.decoder = decoders.Sequence([*fused, *(decoders.Replace(*pair) for pair in _CLEAN_UP)])
    return tokenizer


_CLEAN_UP = (  # of `clean_up_tokenization` in transformers
    *((f" {mark}", mark) for mark in ".?!,"),
    (" ' ", "'"),
    *((f" {end}", end) for end in ("n't", "'m", "'s", "'ve", "'re")),
)


def _cleans_up(made: Any) -> bool:
    bpe = type(made.backend_tokenizer.model).__name__ == "BPE"
    return bool(
        made.clean_up_tokenization_spaces
        and (not bpe or made.clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output)
    )


def _loaded(kind: Any, folder: Path) -> Any:
    return kind.from_pretrained(folder, trust_remote_code=False, local_files_only=True)


def _check_files(folder: Path) -> None:
    fast = _has_fast_tokenizer(folder)
    pieces = next((name for name in _PIECES if (folder / name).is_file()), None)
    if not fast and pieces and find_spec("sentencepiece") is None:
        raise CheckpointError(
            f"{folder}: no tokenizer.json; to make it from {pieces}, `pip install sentencepiece` beside transformers"
        )
    if not fast and not pieces and not any(all((folder / n).is_file() for n in names) for names in _SLOW_FILES):
        raise CheckpointError(
            f"{folder}: no tokenizer.json, nor vocab.json and merges.txt or vocab.txt to make it from"
        )
    for name in _JSON:
        if (folder / name).is_file():
            read_json(folder / name)


def _settings(folder: Path) -> dict[str, Any]:
    path = folder / "tokenizer_config.json"
    return read_json(path) if path.is_file() else {}


def _has_fast_tokenizer(folder: Path) -> bool:
    return (folder / "tokenizer.json").is_file()


def write(folder: Path, path: Path, vocab_size: int) -> None:
    """Writes `path`, without the added tokens that lie behind the `vocab_size` rows of the embedding table."""
    made = load(folder)
    tokenizer = backend(made, folder)
    if most := made.init_kwargs.get("max_length"):
        print(f"{folder}: says max_length {most}, but texts are not cut in the bundle", file=sys.stderr)
    if max(tokenizer.get_vocab(with_added_tokens=False).values(), default=0) >= vocab_size:
        raise CheckpointError(
            f"{folder}: the tokenizer writes more tokens than the {vocab_size} that have an embedding"
        )
    embedded(tokenizer, vocab_size).save(str(path), pretty=False)


def embedded(tokenizer: Tokenizer, vocab_size: int) -> Tokenizer:
    """Without the added tokens from id `vocab_size` on."""
    if max(tokenizer.get_vocab().values(), default=0) < vocab_size:
        return tokenizer
    content = json.loads(tokenizer.to_str())
    content["added_tokens"] = [token for token in content["added_tokens"] if token["id"] < vocab_size]
    return Tokenizer.from_str(json.dumps(content))


def image_token(folder: Path) -> int:
    """Id of `<image>`. A tokenizer without it gets it behind its last token, as the reference's processor does."""
    tokenizer = read(folder)
    tokenizer.add_special_tokens([AddedToken("<image>", normalized=False, special=True)])
    return tokenizer.token_to_id("<image>")


def question_facts(folder: Path, out: Path, cfg: Any, kind: str) -> dict[str, Any]:
    """The `qformer.text` entry of `bundle.json`, beside the Q-Former's tokenizer in `out`."""
    source = folder / QUESTION_FOLDER
    if not source.is_dir():
        raise CheckpointError(
            f"{folder}: the Q-Former reads questions, but its tokenizer folder {QUESTION_FOLDER} is missing"
        )
    write(source, out / _QUESTION_TOKENIZER, cfg.vocab_size)
    usual = _QUESTIONS[kind]
    side = _settings(source).get("truncation_side", usual["truncation_side"])
    if side not in ("left", "right"):
        raise CheckpointError(f"{source}: truncation_side is `{side}`; left and right are possible")
    return {
        "tokenizer": _QUESTION_TOKENIZER,
        "max_tokens": min(usual["max_tokens"], cfg.max_position_embeddings),
        "max_positions": cfg.max_position_embeddings,
        "pad": cfg.pad_token_id,
        "truncation_side": side,
        "reads": usual["reads"],
    }
