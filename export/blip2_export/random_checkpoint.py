"""Random BLIP-2 OPT checkpoints for tests: every parameter drawn anew, so that no stage is degenerate.

`transformers` initialises the vision model with a standard deviation of 1e-10 and the query tokens with zeros; such a model
answers alike whatever it sees, and any mistake in a graph would go unseen.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import Blip2Config, Blip2ForConditionalGeneration, PreTrainedTokenizerFast

BASE: dict[str, dict[str, Any]] = {
    "vision_config": {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": 28,
        "patch_size": 14,
    },
    "qformer_config": {
        "vocab_size": 99,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "cross_attention_frequency": 2,
    },
    "text_config": {
        "model_type": "opt",
        "hidden_size": 32,
        "word_embed_proj_dim": 32,
        "ffn_dim": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
    },
    "top": {"num_query_tokens": 8},
}
_OPT_350M = {"do_layer_norm_before": False, "word_embed_proj_dim": 16}
SHAPES: dict[str, dict[str, dict[str, Any]]] = {
    "tiny": {},
    "odd-1": {  # head dimensions 12 (vision), 20 (decoder): no powers of two; three Q-Former layers
        "vision_config": {
            "hidden_size": 36,
            "num_attention_heads": 3,
            "image_size": 40,
            "patch_size": 8,
            "num_hidden_layers": 3,
        },
        "qformer_config": {"hidden_size": 48, "num_attention_heads": 6, "num_hidden_layers": 3},
        "text_config": {"hidden_size": 60, "word_embed_proj_dim": 60, "num_attention_heads": 3, "ffn_dim": 52},
        "top": {"num_query_tokens": 5},
    },
    "odd-2": {
        "text_config": {**_OPT_350M, "hidden_size": 48, "num_attention_heads": 3}
    },  # projected embeddings, post-norm
    "odd-3": {
        "text_config": {"enable_bias": False, "layer_norm_elementwise_affine": False},
        "top": {"num_query_tokens": 32},
    },
    "odd-4": {
        "qformer_config": {"cross_attention_frequency": 1, "num_hidden_layers": 4},
        "text_config": {"tie_word_embeddings": False},
    },
    "odd-5": {
        "qformer_config": {"cross_attention_frequency": 3, "num_hidden_layers": 5},
        "text_config": {"activation_function": "gelu"},
    },
    "odd-6": {"vision_config": {"hidden_size": 88, "num_attention_heads": 1, "patch_size": 7, "qkv_bias": False}},
    "odd-7": {
        "text_config": {"hidden_size": 88, "word_embed_proj_dim": 88, "num_attention_heads": 1, "num_hidden_layers": 4}
    },
    "odd-8": {
        "text_config": {"_remove_final_layer_norm": True, "num_attention_heads": 2},
        "top": {"num_query_tokens": 1},
    },
    "odd-9": {
        "vision_config": {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5},
        "text_config": {**_OPT_350M, "tie_word_embeddings": False},
    },
}
LARGE: dict[str, dict[str, dict[str, Any]]] = {
    "opt-2.7b": {  # the dimensions of the released blip2-opt-2.7b
        "vision_config": {
            "hidden_size": 1408,
            "intermediate_size": 6144,
            "num_hidden_layers": 39,
            "num_attention_heads": 16,
            "image_size": 224,
        },
        "qformer_config": {
            "vocab_size": 30522,
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "encoder_hidden_size": 1408,
        },
        "text_config": {
            "vocab_size": 50304,
            "hidden_size": 2560,
            "word_embed_proj_dim": 2560,
            "ffn_dim": 10240,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "max_position_embeddings": 2048,
        },
        "top": {"num_query_tokens": 32},
    },
}
_SENTENCES = (
    "a red star left of a blue ring",
    "Question: what colour is the star? Answer: red\n",
    "two dogs play on the beach near the water",
    "Question: how many objects are there? Answer: three\n",
)


def write(folder: Path, shape: str, seed: int, dtype: torch.dtype = torch.float32, shard_bytes: int = 2 << 30) -> None:
    """Writes the folder: config, safetensors in shards, tokenizer, processor configs. Holds one shard in memory."""
    tokenizer = bpe_tokenizer()
    parts = {key: {**base, **(SHAPES | LARGE)[shape].get(key, {})} for key, base in BASE.items()}
    newline = tokenizer.encode("\n", add_special_tokens=False)[0]
    parts["text_config"] |= {"bos_token_id": 2, "eos_token_id": newline, "pad_token_id": 1}
    parts["text_config"].setdefault("vocab_size", len(tokenizer))
    top = parts.pop("top")
    config = Blip2Config(**parts, **top, image_token_index=tokenizer.convert_tokens_to_ids("<image>"))
    config.architectures, config.dtype = ["Blip2ForConditionalGeneration"], dtype
    config.save_pretrained(folder)
    write_shards(folder, _shapes(config), seed, dtype, shard_bytes)
    tokenizer.save_pretrained(folder)
    side = config.vision_config.image_size
    image = {"image_processor_type": "BlipImageProcessor", "size": {"height": side, "width": side}, "resample": 3}
    (folder / "preprocessor_config.json").write_text(json.dumps(image))


def _shapes(config: Blip2Config) -> dict[str, torch.Size]:
    """Name and shape of every parameter that a checkpoint stores."""
    with torch.device("meta"):
        model = Blip2ForConditionalGeneration(config)
        if config.text_config.word_embed_proj_dim != config.text_config.hidden_size:
            model.language_projection = torch.nn.Linear(
                config.qformer_config.hidden_size, config.text_config.hidden_size
            )
    shapes = {name: value.shape for name, value in model.named_parameters()}
    if not config.text_config.tie_word_embeddings:
        shapes["language_model.lm_head.weight"] = model.language_model.lm_head.weight.shape
    return shapes


def write_shards(folder: Path, shapes: dict[str, torch.Size], seed: int, dtype: torch.dtype, most: int) -> None:
    """Every parameter drawn anew: `transformers`' own initialisation gives an image encoder and queries that do nothing."""
    groups: list[list[str]] = [[]]
    size = 0
    for name, shape in shapes.items():
        bytes_ = shape.numel() * dtype.itemsize
        if groups[-1] and size + bytes_ > most:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += bytes_
    files = [f"model-{i + 1:05}-of-{len(groups):05}.safetensors" for i in range(len(groups))]
    files = files if len(files) > 1 else ["model.safetensors"]
    generator = torch.Generator().manual_seed(seed)
    for file, names in zip(files, groups, strict=True):
        save_file({n: draw(n, shapes[n], generator).to(dtype) for n in names}, folder / file, {"format": "pt"})
    if len(files) > 1:
        where = {name: file for file, names in zip(files, groups, strict=True) for name in names}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))


def draw(name: str, shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    """The language model's blocks outweigh its embeddings; a tied head would otherwise repeat the last token for ever."""
    if not shape:
        return 0.05 + 0.1 * torch.rand(shape, generator=generator)
    centre = 1.0 if "norm" in name.lower() and name.endswith("weight") else 0.0
    return centre + _spread(name, shape) * torch.randn(shape, generator=generator)


def _spread(name: str, shape: torch.Size) -> float:
    if len(shape) < 2:
        return 0.3
    if name.endswith(
        ("query_tokens", "embed_positions.weight", "word_embeddings.weight", "position_embeddings.weight")
    ):
        return 1.0
    if name.endswith("embed_tokens.weight"):
        return 0.5
    strong = ("language_model", "language_projection", "cls.", "text_projection")
    return (2.5 if name.startswith(strong) else 0.8) / shape[-1] ** 0.5


def bpe_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<s>", "<pad>", "</s>", "<unk>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_SENTENCES, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="</s> $A", special_tokens=[("</s>", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="</s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        additional_special_tokens=["<image>"],
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("out", type=Path, help="folder to write")
    from blip2_export import random_retrieval as stage1

    shapes = sorted(SHAPES | LARGE | stage1.SHAPES | stage1.LARGE)
    parser.add_argument("--shape", choices=shapes, default="tiny", help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float32")


def run(args: argparse.Namespace) -> int:
    if args.out.exists():
        print(f"error: {args.out} exists", file=sys.stderr)
        return 2
    from blip2_export import random_retrieval as stage1

    writer = stage1.write if args.shape in stage1.SHAPES | stage1.LARGE else write
    writer(args.out, args.shape, args.seed, getattr(torch, args.dtype))
    return 0
