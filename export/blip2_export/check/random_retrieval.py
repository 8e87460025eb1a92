"""Random stage-1 checkpoints for tests: Hugging Face folders, with or without the head that writes; LAVIS files and their parts."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    Blip2Config,
    Blip2ForImageTextRetrieval,
    OPTConfig,
    PreTrainedTokenizerFast,
    T5Config,
)

from blip2_export import vocabulary
from blip2_export.check import random_checkpoint

_TINY = random_checkpoint.BASE
_BASE: dict[str, dict[str, Any]] = {
    "vision_config": _TINY["vision_config"],
    "qformer_config": {**_TINY["qformer_config"], "use_qformer_text_input": True, "max_position_embeddings": 64},
    "top": {**_TINY["top"], "image_text_hidden_size": 24},
}
CLIP = {"pre_layernorm": True, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}
SHAPES: dict[str, dict[str, Any]] = {
    "itm-tiny": {"writes": False},
    "itm-odd": {  # as the published files: an image token behind the embedded ones
        "vision_config": {"hidden_size": 36, "num_attention_heads": 3, "image_size": 40, "patch_size": 8},
        "qformer_config": {"hidden_size": 36, "num_attention_heads": 3, "num_hidden_layers": 3},
        "top": {"num_query_tokens": 5, "image_text_hidden_size": 20},
        "writes": False,
        "image_token": True,
    },
    "itg-tiny": {},
    "itg-odd-1": {  # head dimensions 20 and 12, padded in the cache
        "vision_config": {"hidden_size": 36, "num_attention_heads": 3},
        "qformer_config": {"hidden_size": 60, "num_attention_heads": 3, "num_hidden_layers": 3},
        "top": {"num_query_tokens": 5, "image_text_hidden_size": 13},
    },
    "itg-odd-2": {  # head dimension 11, cross-attention in two layers of five
        "qformer_config": {
            "hidden_size": 44,
            "num_attention_heads": 4,
            "num_hidden_layers": 5,
            "cross_attention_frequency": 3,
        },
        "top": {"num_query_tokens": 32},
    },
    "itg-one-layer": {"qformer_config": {"num_hidden_layers": 1}, "top": {"num_query_tokens": 1}},
    "itg-clip": {"vision_config": {**CLIP, "num_hidden_layers": 3, "post_layernorm_eps": 1e-3}},
}
LARGE: dict[str, dict[str, Any]] = {
    "itm-vit-g": {  # the dimensions of the released blip2-itm-vit-g
        "vision_config": random_checkpoint.LARGE["opt-2.7b"]["vision_config"],
        "qformer_config": {
            **random_checkpoint.LARGE["opt-2.7b"]["qformer_config"],
            "vocab_size": 30523,
            "max_position_embeddings": 512,
        },
        "top": {"num_query_tokens": 32, "image_text_hidden_size": 256},
    },
}


def write(folder: Path, shape: str | dict[str, Any], seed: int, dtype: torch.dtype = torch.float32) -> None:
    """A `Blip2ForImageTextRetrieval` folder; those that write have the head and the temperature as extra tensors."""
    chosen = (SHAPES | LARGE)[shape] if isinstance(shape, str) else shape
    tokenizer = random_checkpoint.word_piece_tokenizer()
    tokenizer.add_special_tokens(["[DEC]"])
    base = {**_BASE, "qformer_config": {**_BASE["qformer_config"], "vocab_size": tokenizer.get_vocab_size()}}
    parts = {key: {**base[key], **chosen.get(key, {})} for key in base}
    image = tokenizer.get_vocab_size() if chosen.get("image_token") else None
    if image is not None:
        tokenizer.add_special_tokens(["<image>"])
    config = Blip2Config(
        vision_config=parts["vision_config"],
        qformer_config=parts["qformer_config"],
        image_token_index=image,
        **parts["top"],
    )
    config.architectures, config.dtype = ["Blip2ForImageTextRetrieval"], dtype
    config.save_pretrained(folder)
    random_checkpoint.write_shards(folder, _shapes(config, chosen.get("writes", True)), seed, dtype, 2 << 30)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **vocabulary.NAMES).save_pretrained(folder)
    side = config.vision_config.image_size
    processor = {"image_processor_type": "BlipImageProcessor", "size": {"height": side, "width": side}, "resample": 3}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))


def _shapes(config: Blip2Config, writes: bool) -> dict[str, torch.Size]:
    with torch.device("meta"):
        model = Blip2ForImageTextRetrieval(config)
    shapes = {name: value.shape for name, value in model.named_parameters()}
    width = config.vision_config.hidden_size
    if getattr(config.vision_config, "pre_layernorm", False):
        del shapes["vision_model.embeddings.patch_embedding.bias"]
        shapes |= {f"vision_model.pre_layernorm.{kind}": torch.Size([width]) for kind in ("weight", "bias")}
    return {**shapes, **({n: torch.Size(s) for n, s in _head(config.qformer_config).items()} if writes else {})}


def _head(cfg: Any) -> dict[str, tuple[int, ...]]:
    width = cfg.hidden_size
    return {
        "cls.predictions.transform.dense.weight": (width, width),
        "cls.predictions.transform.dense.bias": (width,),
        "cls.predictions.transform.LayerNorm.weight": (width,),
        "cls.predictions.transform.LayerNorm.bias": (width,),
        "cls.predictions.bias": (cfg.vocab_size,),
        "temp": (),
    }


# LAVIS files


@dataclass(frozen=True)
class Lavis:
    """One model as LAVIS builds it: head sizes are 64, and 88 in EVA."""

    kind: str = "stage 1"  # or `opt`, `t5`
    vision: str = "eva"  # or `clip`
    holds_vision: bool = False  # as after training the image encoder
    vision_width: int = 88
    vision_blocks: int = 2  # used ones; an original file has one more
    image_size: int = 28
    width: int = 64
    n_layers: int = 3
    n_queries: int = 5
    inner: int = 48
    n_positions: int = 64
    joint: int = 20


def write_lavis(folder: Path, model: Lavis, seed: int) -> None:
    """`model.pth`; `vision.pth` unless it holds that; `llm/` in stage 2, `bert/` with the Q-Former's tokenizer in stage 1."""
    folder.mkdir(parents=True)
    draw = _Draw(seed)
    state = _lavis_qformer(model, draw)
    if model.kind == "stage 1":
        (folder / "bert").mkdir()
        tokenizer = random_checkpoint.word_piece_tokenizer()
        tokenizer.save(str(folder / "bert" / "tokenizer.json"))
        state |= _lavis_heads(model, draw, tokenizer.get_vocab_size() + 1)
    else:
        state |= _write_language(folder / "llm", model, draw)
    eye = _lavis_vision(model, draw)
    if model.holds_vision:
        n = model.vision_blocks
        extra = (f"blocks.{n}.", f"resblocks.{n}.", "norm.", "head.", "ln_post.", "proj")
        state |= {f"visual_encoder.{k}": v for k, v in eye.items() if not any(e in k and _top(k, e) for e in extra)}
    else:
        torch.save(eye, folder / "vision.pth")
    torch.save({"model": state, "optimizer": {"state": {}}, "scaler": None, "epoch": 3}, folder / "model.pth")


def _top(name: str, part: str) -> bool:
    """Whether `part` is no piece of a block that is used."""
    return part.split(".")[0] in ("blocks", "resblocks") or name.startswith(part)


class _Draw:
    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, name: str, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        value = random_checkpoint.draw(name.replace("ln_", "norm_"), torch.Size(shape), self.generator)
        return value.to(dtype)

    def linear(self, name: str, n_in: int, n_out: int, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
        return {
            f"{name}.weight": self(f"{name}.weight", n_out, n_in, dtype=dtype),
            f"{name}.bias": self(f"{name}.bias", n_out, dtype=dtype),
        }

    def norm(self, name: str, width: int) -> dict[str, torch.Tensor]:
        return {f"{name}.{kind}": self(f"{name}.norm.{kind}", width) for kind in ("weight", "bias")}


def _lavis_vision(model: Lavis, draw: _Draw) -> dict[str, torch.Tensor]:
    """An original file: matrices in half precision, one block more than is used, and the network's former top."""
    half, width, patch = torch.float16, model.vision_width, 14
    n_positions = (model.image_size // patch) ** 2 + 1
    if model.vision == "clip":
        state = {
            "class_embedding": draw("class_embedding", width),
            "positional_embedding": draw("positional_embedding", n_positions, width),
            "conv1.weight": draw("conv1.weight", width, 3, patch, patch, dtype=half),
            **draw.norm("ln_pre", width),
            **draw.norm("ln_post", width),
            "proj": draw("proj", width, 16),
        }
        for i in range(model.vision_blocks + 1):
            name = f"transformer.resblocks.{i}."
            state |= draw.norm(name + "ln_1", width) | draw.norm(name + "ln_2", width)
            state[name + "attn.in_proj_weight"] = draw(name + "attn.in_proj_weight", 3 * width, width)
            state[name + "attn.in_proj_bias"] = draw(name + "attn.in_proj_bias", 3 * width)
            state |= draw.linear(name + "attn.out_proj", width, width, half)
            state |= draw.linear(name + "mlp.c_fc", width, 4 * width, half)
            state |= draw.linear(name + "mlp.c_proj", 4 * width, width, half)
        return state
    inner = int(width * 4.3637)
    state = {
        "cls_token": draw("cls_token", 1, 1, width),
        "pos_embed": draw("pos_embed", 1, n_positions, width),
        "patch_embed.proj.weight": draw("patch_embed.proj.weight", width, 3, patch, patch, dtype=half),
        "patch_embed.proj.bias": draw("patch_embed.proj.bias", width, dtype=half),
        **draw.norm("norm", width),
        **draw.linear("head", width, 16),
    }
    for i in range(model.vision_blocks + 1):
        name = f"blocks.{i}."
        state |= draw.norm(name + "norm1", width) | draw.norm(name + "norm2", width)
        state |= {name + f"attn.{part}_bias": draw(name + f"attn.{part}_bias", width) for part in ("q", "v")}
        state[name + "attn.qkv.weight"] = draw(name + "attn.qkv.weight", 3 * width, width, dtype=half)
        state |= draw.linear(name + "attn.proj", width, width, half)
        state |= draw.linear(name + "mlp.fc1", width, inner, half) | draw.linear(name + "mlp.fc2", inner, width, half)
    return state


def _lavis_qformer(model: Lavis, draw: _Draw) -> dict[str, torch.Tensor]:
    """What both stages hold: queries, their network, and the norm behind the image encoder."""
    width, inner = model.width, model.inner
    state = {
        "query_tokens": draw("query_tokens", 1, model.n_queries, width),
        **draw.norm("ln_vision", model.vision_width),
        **draw.norm("Qformer.bert.embeddings.LayerNorm", width),
    }
    for i in range(model.n_layers):
        name = f"Qformer.bert.encoder.layer.{i}."
        for kind in ("attention", "crossattention")[: 1 if i % 2 else 2]:
            source = model.vision_width if kind == "crossattention" else width
            state |= draw.linear(f"{name}{kind}.self.query", width, width)
            state |= draw.linear(f"{name}{kind}.self.key", source, width)
            state |= draw.linear(f"{name}{kind}.self.value", source, width)
            state |= draw.linear(f"{name}{kind}.output.dense", width, width)
            state |= draw.norm(f"{name}{kind}.output.LayerNorm", width)
        for branch in ("", "_query")[0 if model.kind == "stage 1" else 1 :]:
            state |= draw.linear(f"{name}intermediate{branch}.dense", width, inner)
            state |= draw.linear(f"{name}output{branch}.dense", inner, width)
            state |= draw.norm(f"{name}output{branch}.LayerNorm", width)
    return state


def _lavis_heads(model: Lavis, draw: _Draw, vocab_size: int) -> dict[str, torch.Tensor]:
    width = model.width
    embeddings, head = "Qformer.bert.embeddings.", "Qformer.cls.predictions."
    words = draw(embeddings + "word_embeddings.weight", vocab_size, width)
    bias = draw(head + "bias", vocab_size)
    return {
        embeddings + "position_ids": torch.arange(model.n_positions)[None],
        embeddings + "word_embeddings.weight": words,
        embeddings + "position_embeddings.weight": draw(embeddings + "position.weight", model.n_positions, width),
        **draw.linear(head + "transform.dense", width, width),
        **draw.norm(head + "transform.LayerNorm", width),
        head + "bias": bias,
        head + "decoder.weight": words,
        head + "decoder.bias": bias,
        **draw.linear("vision_proj", width, model.joint),
        **draw.linear("text_proj", width, model.joint),
        **draw.linear("itm_head", width, 2),
        "temp": draw("temp"),
    }


def _write_language(folder: Path, model: Lavis, draw: _Draw) -> dict[str, torch.Tensor]:
    """The folder of a language model in half precision; gives the projection to it, and the copies a LAVIS file keeps."""
    tokenizer = json.loads(random_checkpoint.TOKENIZERS[model.kind]()[0].backend_tokenizer.to_str())
    tokenizer["added_tokens"] = [t for t in tokenizer["added_tokens"] if t["content"] != "<image>"]
    n_tokens = Tokenizer.from_str(json.dumps(tokenizer)).get_vocab_size()
    if model.kind == "opt":
        opt = {"hidden_size": 36, "word_embed_proj_dim": 36, "ffn_dim": 52, "num_hidden_layers": 2}
        config = OPTConfig(**opt, num_attention_heads=3, max_position_embeddings=64, vocab_size=n_tokens + 3)
        kind, width = AutoModelForCausalLM, 36
    else:
        t5 = {"d_model": 36, "d_kv": 12, "d_ff": 52, "num_layers": 2, "num_heads": 3, "vocab_size": n_tokens + 3}
        config = T5Config(**t5, feed_forward_proj="gated-gelu", tie_word_embeddings=False, decoder_start_token_id=0)
        kind, width = AutoModelForSeq2SeqLM, 36
    config.dtype = torch.float16
    config.save_pretrained(folder)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in kind.from_config(config).named_parameters()}
    if model.kind == "t5":
        shapes["lm_head.weight"] = shapes["shared.weight"]
    weights = {n: random_checkpoint.draw(f"language_model.{n}", s, draw.generator).half() for n, s in shapes.items()}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    if model.kind == "opt":
        kept = {"opt_model.lm_head.weight": weights["model.decoder.embed_tokens.weight"]}
    else:
        kept = {f"t5_model.{side}.embed_tokens.weight": weights["shared.weight"] for side in ("encoder", "decoder")}
    return {**draw.linear(f"{model.kind}_proj", model.width, width), **kept}
