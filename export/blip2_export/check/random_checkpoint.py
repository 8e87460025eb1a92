"""Random BLIP-2 and InstructBLIP checkpoints for tests: every parameter drawn anew, so that no stage is degenerate.

`transformers` initialises the vision model with a standard deviation of 1e-10 and the query tokens with zeros; such a model
answers alike whatever it sees, and any mistake in a graph would go unseen.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from blip2_export import vocabulary

Shape = dict[str, dict[str, Any]]  # what differs from the base, part by part
BASE: Shape = {
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
    "top": {"num_query_tokens": 8},
}
_LANGUAGES: dict[str, dict[str, Any]] = {
    "opt": {
        "hidden_size": 32,
        "word_embed_proj_dim": 32,
        "ffn_dim": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
    },
    "t5": {  # as BLIP-2's Flan-T5: its own head, unscaled, gated by the exact gelu
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 48,
        "num_layers": 2,
        "num_heads": 4,
        "feed_forward_proj": "gated-gelu",
        "dense_act_fn": "gelu",
        "tie_word_embeddings": False,
    },
    "llama": {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
    },
}
_OPT_350M = {"do_layer_norm_before": False, "word_embed_proj_dim": 16}
SHAPES: dict[str, Shape] = {
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
_T5, _LLAMA, _INSTRUCT = {"model_type": "t5"}, {"model_type": "llama"}, {"model_type": "instructblip"}
_READS_TEXT = {"use_qformer_text_input": True}
FAMILIES: dict[str, Shape] = {  # other language models, and Q-Formers that read the question
    "t5": {"text_config": _T5},
    "t5-odd-1": {  # three heads of 12, together narrower than the model
        "text_config": {**_T5, "d_model": 40, "d_kv": 12, "num_heads": 3, "d_ff": 52, "num_layers": 3},
        "top": {"num_query_tokens": 5},
    },
    "t5-odd-2": {  # the first T5: relu without a gate, tied and scaled head; few buckets over few positions
        "text_config": {
            **_T5,
            "d_kv": 5,
            "num_layers": 3,
            "feed_forward_proj": "relu",
            "dense_act_fn": "relu",
            "tie_word_embeddings": True,
            "relative_attention_num_buckets": 10,
            "relative_attention_max_distance": 20,
        }
    },
    "t5-odd-3": {
        "text_config": {**_T5, "dense_act_fn": "gelu_new", "d_kv": 16, "num_layers": 3, "num_decoder_layers": 1}
    },
    "llama": {"text_config": _LLAMA},
    "instruct-t5": {"text_config": _T5, "top": _INSTRUCT},
    "instruct-llama": {"text_config": {**_LLAMA, "num_attention_heads": 4, "num_key_value_heads": 2}, "top": _INSTRUCT},
    "instruct-llama-odd-1": {  # heads of 22 and three query heads to each of the cache's; biases
        "qformer_config": {"hidden_size": 48, "num_attention_heads": 6, "num_hidden_layers": 3},
        "text_config": {
            **_LLAMA,
            "hidden_size": 60,
            "head_dim": 22,
            "num_attention_heads": 6,
            "attention_bias": True,
            "mlp_bias": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
        },
        "top": {**_INSTRUCT, "num_query_tokens": 5},
    },
    "instruct-llama-odd-2": {  # one head in the cache, tied
        "qformer_config": {"cross_attention_frequency": 1, "num_hidden_layers": 1},
        "text_config": {**_LLAMA, "num_attention_heads": 4, "num_key_value_heads": 1, "tie_word_embeddings": True},
        "top": _INSTRUCT,
    },
    "instruct-opt": {"text_config": _OPT_350M, "top": _INSTRUCT},
    "vqa-opt": {"qformer_config": _READS_TEXT},
    "vqa-t5": {
        "qformer_config": {**_READS_TEXT, "cross_attention_frequency": 3, "num_hidden_layers": 4},
        "text_config": {**_T5, "d_kv": 12},
        "top": {"num_query_tokens": 3},
    },
}
_RELEASED = {
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
    "top": {"num_query_tokens": 32},
}
_MEDIUM = {  # a ViT-L/14 and the Q-Former of the released models
    "vision_config": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "image_size": 224,
    },
    "qformer_config": {**_RELEASED["qformer_config"], "encoder_hidden_size": 1024},
    "top": {"num_query_tokens": 32},
}
LARGE: dict[str, Shape] = {
    "demo": {  # the dimensions of `models/demo-opt`
        "vision_config": {
            "hidden_size": 128,
            "intermediate_size": 512,
            "num_hidden_layers": 6,
            "image_size": 96,
            "patch_size": 12,
        },
        "qformer_config": {
            "hidden_size": 128,
            "intermediate_size": 512,
            "num_hidden_layers": 5,
            "encoder_hidden_size": 128,
        },
        "text_config": {
            "vocab_size": 456,
            "hidden_size": 128,
            "word_embed_proj_dim": 128,
            "ffn_dim": 512,
            "num_hidden_layers": 4,
        },
        "top": {"num_query_tokens": 32},
    },
    "medium": {  # the size of opt-350m, in the order of norms and with the full-width embeddings that all other OPTs have
        **_MEDIUM,
        "text_config": {
            "vocab_size": 50272,
            "hidden_size": 1024,
            "word_embed_proj_dim": 1024,
            "ffn_dim": 4096,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "max_position_embeddings": 2048,
        },
    },
    "medium-t5": {  # flan-t5-large: a step reads 385 million weights, one of `medium` 353 million
        **_MEDIUM,
        "text_config": {
            **_T5,
            "vocab_size": 32128,
            "d_model": 1024,
            "d_kv": 64,
            "d_ff": 2816,
            "num_layers": 24,
            "num_heads": 16,
        },
    },
    "opt-2.7b": {  # the dimensions of the released blip2-opt-2.7b
        **_RELEASED,
        "text_config": {
            "vocab_size": 50304,
            "hidden_size": 2560,
            "word_embed_proj_dim": 2560,
            "ffn_dim": 10240,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "max_position_embeddings": 2048,
        },
    },
    "flan-t5-xl": {  # the dimensions of the released blip2-flan-t5-xl
        **_RELEASED,
        "text_config": {
            **_T5,
            "vocab_size": 32128,
            "d_model": 2048,
            "d_kv": 64,
            "d_ff": 5120,
            "num_layers": 24,
            "num_heads": 32,
        },
    },
}
_SENTENCES = (
    "a red star left of a blue ring",
    "Question: what colour is the star? Answer: red\n",
    "two dogs play on the beach near the water",
    "Question: how many objects are there? Answer: three\n",
)


def write(
    folder: Path, shape: str | Shape, seed: int, dtype: torch.dtype = torch.float32, shard_bytes: int = 2 << 30
) -> None:
    """Writes the folder: config, safetensors in shards, tokenizers, processor configs. Holds one shard in memory."""
    plan = _plan(shape, dtype)
    plan.config.save_pretrained(folder)
    write_shards(folder, _shapes(plan.model, plan.config), seed, dtype, shard_bytes)
    plan.tokenizer.save_pretrained(folder)
    if plan.asked:
        plan.asked.truncation_side = "left" if plan.model is InstructBlipForConditionalGeneration else "right"
        plan.asked.save_pretrained(folder / "qformer_tokenizer")
    side = plan.config.vision_config.image_size
    image = {"image_processor_type": "BlipImageProcessor", "size": {"height": side, "width": side}, "resample": 3}
    (folder / "preprocessor_config.json").write_text(json.dumps(image))


def n_parameters(shape: str | Shape) -> int:
    """How many numbers `write` would write."""
    plan = _plan(shape, torch.float32)
    return sum(size.numel() for size in _shapes(plan.model, plan.config).values())


@dataclass(frozen=True)
class _Plan:
    config: Blip2Config | InstructBlipConfig
    model: type[PreTrainedModel]
    tokenizer: PreTrainedTokenizerFast
    asked: PreTrainedTokenizerFast | None  # of the question that the Q-Former reads


def _plan(shape: str | Shape, dtype: torch.dtype) -> _Plan:
    wanted = (SHAPES | FAMILIES | LARGE)[shape] if isinstance(shape, str) else shape
    parts = {key: {**base, **wanted.get(key, {})} for key, base in BASE.items()}
    top = parts.pop("top")
    instruct = top.pop("model_type", "blip-2") == "instructblip"
    language = wanted.get("text_config", {}).get("model_type", "opt")
    tokenizer, ids = TOKENIZERS[language]()
    tokenizer = _filled(tokenizer, wanted.get("text_config", {}).get("vocab_size", 0))
    sizes = {**_LANGUAGES[language], **ids, "vocab_size": len(tokenizer)}
    parts["text_config"] = {**sizes, **wanted.get("text_config", {}), "model_type": language}
    reads_text = instruct or parts["qformer_config"].get("use_qformer_text_input")
    asked = _question_tokenizer() if reads_text else None
    if asked:
        parts["qformer_config"]["vocab_size"] = len(asked)
    image_token = tokenizer.convert_tokens_to_ids("<image>")
    kind = InstructBlipConfig if instruct else Blip2Config
    model = InstructBlipForConditionalGeneration if instruct else Blip2ForConditionalGeneration
    config = kind(**parts, **top, image_token_index=image_token)
    config.architectures, config.dtype = [model.__name__], dtype
    return _Plan(config, model, tokenizer, asked)


def _shapes(kind: type[PreTrainedModel], config: Blip2Config | InstructBlipConfig) -> dict[str, torch.Size]:
    """Name and shape of every parameter that a checkpoint stores."""
    text, asked = config.text_config, config.qformer_config
    with torch.device("meta"):
        model = kind(config)
        if getattr(text, "word_embed_proj_dim", text.hidden_size) != text.hidden_size:
            model.language_projection = torch.nn.Linear(asked.hidden_size, text.hidden_size)
    shapes = {name: value.shape for name, value in model.named_parameters()}
    if not getattr(text, "scale_decoder_outputs", text.tie_word_embeddings):
        shapes["language_model.lm_head.weight"] = model.language_model.lm_head.weight.shape
    if getattr(asked, "use_qformer_text_input", False):
        shapes["embeddings.word_embeddings.weight"] = torch.Size((asked.vocab_size, asked.hidden_size))
        shapes["embeddings.position_embeddings.weight"] = torch.Size((asked.max_position_embeddings, asked.hidden_size))
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


_WIDE = (
    "query_tokens",
    "embed_positions.weight",
    "relative_attention_bias.weight",
    "word_embeddings.weight",
    "position_embeddings.weight",
)


def _spread(name: str, shape: torch.Size) -> float:
    if len(shape) < 2:
        return 0.3
    if name.endswith(_WIDE):
        return 1.0
    if name.endswith("shared.weight"):
        return 0.3
    if name.endswith("embed_tokens.weight"):
        return 0.5
    if name.endswith("SelfAttention.q.weight"):
        return 0.4 / shape[-1] ** 0.5  # T5 does not scale its scores, its weights do
    if name.endswith("EncDecAttention.q.weight"):
        return 0.6 / shape[-1] ** 0.5  # picks out positions, so that pictures tell
    if name.endswith("DenseReluDense.wo.weight"):
        return 1 / shape[-1] ** 0.5  # what relu lets through points one way for all inputs
    if "crossattention" in name:
        return 2.5 / shape[-1] ** 0.5  # so that queries tell pictures apart
    strong = ("language_model", "language_projection", "cls.", "text_projection")
    return (2.5 if name.startswith(strong) else 0.8) / shape[-1] ** 0.5


def _byte_tokenizer() -> tuple[PreTrainedTokenizerFast, dict[str, int]]:
    """Byte-level BPE that starts a text with </s> as OPT's does; a newline ends one. With the ids for config.json."""
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
    fast = _fast(tokenizer, bos_token="</s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>")
    return fast, {"bos_token_id": 2, "eos_token_id": fast.encode("\n", add_special_tokens=False)[0], "pad_token_id": 1}


def _unigram_tokenizer() -> tuple[PreTrainedTokenizerFast, dict[str, int]]:
    """A unigram model that ends a text with </s>, as T5's."""
    fast = _fast(vocabulary.unigram(_SENTENCES, parts=True), eos_token="</s>", pad_token="<pad>", unk_token="<unk>")
    return fast, {"bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0, "decoder_start_token_id": 0}


def _piece_tokenizer() -> tuple[PreTrainedTokenizerFast, dict[str, int]]:
    """BPE over whole pieces that starts a text with <s>, as LLaMA's."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(
        vocab_size=200,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=vocabulary.PRINTABLE,
        show_progress=False,
    )
    tokenizer.train_from_iterator(_SENTENCES, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    fast = _fast(tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    return fast, {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


TOKENIZERS = {"opt": _byte_tokenizer, "t5": _unigram_tokenizer, "llama": _piece_tokenizer}


def _fast(tokenizer: Tokenizer, **special: str) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, additional_special_tokens=["<image>"], **special)


def _filled(fast: PreTrainedTokenizerFast, n: int) -> PreTrainedTokenizerFast:
    """With words up to id `n`, and in the place of bytes that no prompt has.

    A model with more ids than tokens writes texts of nothing, and streams of half letters wait for the other half.
    """
    if n <= len(fast):
        return fast
    content = json.loads(fast.backend_tokenizer.to_str())
    is_bytes, known = content["decoder"]["type"] == "ByteLevel", content["model"]["vocab"]
    words = [f"{'Ġ' if is_bytes else '▁'}w{i}" for i in range(n)]
    for token in [token for token in known if is_bytes and len(token) == 1 and token > "~" and token not in "ĠĊ"]:
        place = known.pop(token)
        known[words[place]] = place
    more = [*fast.convert_ids_to_tokens(range(len(known), len(fast))), *words[len(fast) :]]
    if isinstance(known, dict):
        known.update(zip(more, range(len(known), n), strict=True))
    else:
        known.extend((word, -30.0) for word in more)
    return _fast(Tokenizer.from_str(json.dumps(content)), **fast.special_tokens_map)


def word_piece_tokenizer() -> Tokenizer:
    """WordPiece as BERT's, without `[DEC]`."""
    return vocabulary.word_piece(_SENTENCES, 180)


def _question_tokenizer() -> PreTrainedTokenizerFast:
    """For the question that the Q-Former reads, with [DEC] behind the trained words."""
    return PreTrainedTokenizerFast(tokenizer_object=word_piece_tokenizer(), bos_token="[DEC]", **vocabulary.NAMES)
