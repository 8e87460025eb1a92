"""Turns a checkpoint folder into what older versions of `transformers` and of the hub's models look like."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file


def pickle_weights(folder: Path, n_shards: int = 1, zipped: bool = True) -> None:
    """`pytorch_model.bin`, or shards with an index, in place of safetensors; a tied head is stored, too."""
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
        file.unlink()
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)
    head, table = "language_model.lm_head.weight", "language_model.model.decoder.embed_tokens.weight"
    tensors.setdefault(head, tensors[table])
    names = sorted(tensors)
    if n_shards == 1:
        torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
        return
    where = {name: f"pytorch_model-{i % n_shards + 1:05}-of-{n_shards:05}.bin" for i, name in enumerate(names)}
    for file in sorted(set(where.values())):
        torch.save({name: tensors[name] for name in names if where[name] == file}, folder / file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))


def forget_image_token(folder: Path) -> None:
    """Neither the configuration nor the tokenizer knows `<image>`, and the configuration is a dump of every default."""
    config = edit(folder / "config.json", image_token_index=None, tie_word_embeddings=False, torch_dtype="float32")
    del config["image_token_index"]
    config.pop("dtype", None)
    config["text_config"] |= {"_name_or_path": "", "prefix": "</s>", "max_length": 20, "torch_dtype": "float16"}
    config["vision_config"] |= {"dropout": 0.0, "projection_dim": 512, "num_channels": 3, "torchscript": False}
    config["qformer_config"] |= {"position_embedding_type": "absolute", "classifier_dropout": None}
    config["qformer_config"]["qformer_text_input"] = config["qformer_config"].pop("use_qformer_text_input", False)
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["added_tokens"] = [token for token in tokenizer["added_tokens"] if token["content"] != "<image>"]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    settings = {"bos_token": "</s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(
        json.dumps({**settings, "tokenizer_class": "GPT2Tokenizer", "add_bos_token": True, "errors": "replace"})
    )
    (folder / "special_tokens_map.json").write_text(json.dumps(settings))


def slow_tokenizer(folder: Path) -> None:
    """vocab.json and merges.txt in place of tokenizer.json."""
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))


def edit(path: Path, **values: Any) -> dict[str, Any]:
    content = json.loads(path.read_text()) | values
    path.write_text(json.dumps(content))
    return content
