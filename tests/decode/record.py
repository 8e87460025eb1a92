"""Runs `generate()` of `transformers` on a scripted table of scores and records what it gives, for `tests/decode.rs`.

`python tests/decode/record.py` rewrites `cases.json`. The next token's logits depend on the last two tokens alone, so a
search that mixes up its rows or their past cannot give the same texts.
"""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)
from transformers.modeling_outputs import CausalLMOutput

VOCABULARY, PAD, N_TABLES = 11, 1, 6


class Table(PreTrainedModel, GenerationMixin):
    """A language model that looks its logits up."""

    config_class = PretrainedConfig
    main_input_name = "input_ids"

    def __init__(self, table: torch.Tensor) -> None:
        super().__init__(PretrainedConfig(vocab_size=VOCABULARY, is_encoder_decoder=False))
        self.table = torch.nn.Parameter(table)

    def prepare_inputs_for_generation(self, input_ids: torch.Tensor, **_: Any) -> dict[str, torch.Tensor]:
        return {"input_ids": input_ids}

    def forward(self, input_ids: torch.Tensor, **_: Any) -> CausalLMOutput:
        before = torch.cat([torch.zeros_like(input_ids[:, :1]), input_ids[:, :-1]], 1)
        return CausalLMOutput(logits=self.table[before, input_ids])


def table(seed: int) -> torch.Tensor:
    """[before, last, next], in steps of 1/4096: JSON carries every value exactly, and ties are rare."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(VOCABULARY, VOCABULARY, VOCABULARY, generator=generator) * 2 * 4096).round() / 4096


def main() -> None:
    models = [Table(table(seed)).eval() for seed in range(N_TABLES)]
    cases = [record(models, options) for options in [*beams(), *processors()]]
    tables = [[round(v, 9) for v in m.table.detach().flatten().tolist()] for m in models]
    shaped = [shape(seed, options) for seed, options in enumerate(warpers())]
    out = {"vocabulary": VOCABULARY, "pad": PAD, "tables": tables, "cases": cases, "shaped": shaped}
    Path(__file__).with_name("cases.json").write_text(json.dumps(out) + "\n")
    print(f"{len(cases)} cases")


def beams() -> list[dict[str, Any]]:
    rng, found = random.Random(0), []
    for n_beams, penalty, early in itertools.product((2, 3, 5), (1.0, 0.0, -1.0, 2.0, 0.6), (False, True, "never")):
        for _ in range(3):
            found.append(
                {
                    "num_beams": n_beams,
                    "length_penalty": penalty,
                    "early_stopping": early,
                    "num_return_sequences": rng.randint(1, n_beams),
                    "max_new_tokens": rng.choice((1, 2, 5, 9, 14)),
                    "min_new_tokens": rng.choice((0, 0, 0, 4)),
                    "eos_token_id": rng.choice(([0], [0], [0, 7], [2, 5, 9])),
                }
            )
    return found


def processors() -> list[dict[str, Any]]:
    rng, found = random.Random(1), []
    choices: dict[str, list[Any]] = {
        "repetition_penalty": [1.3, 0.8, 2.0],
        "no_repeat_ngram_size": [1, 2, 3],
        "bad_words_ids": [[[3]], [[4, 5], [6]], [[8], [2, 3, 4]]],
        "suppress_tokens": [[3, 6], [10]],
        "begin_suppress_tokens": [[4], [2, 8]],
        "forced_bos_token_id": [5],
        "forced_eos_token_id": [0],
        "min_new_tokens": [3, 6],
    }
    for n_beams in (1, 1, 3, 4):
        for _ in range(60):
            options: dict[str, Any] = {"num_beams": n_beams, "max_new_tokens": 10, "eos_token_id": rng.choice(([0], [0, 7]))}
            for name in rng.sample(sorted(choices), rng.randint(1, 4)):
                options[name] = rng.choice(choices[name])
            found.append(options)
    return found


def record(models: list[Table], options: dict[str, Any]) -> dict[str, Any]:
    rng = random.Random(json.dumps(options))
    which = rng.randrange(len(models))
    prompt = [rng.randrange(2, VOCABULARY) for _ in range(rng.randint(1, 5))]
    config = GenerationConfig(do_sample=False, pad_token_id=PAD, use_cache=False, **options)
    with torch.inference_mode():
        out = models[which].generate(
            torch.tensor([prompt]), generation_config=config, return_dict_in_generate=True, output_scores=True
        )
    rows = [row[len(prompt) :] for row in out.sequences.tolist()]
    ends = options["eos_token_id"]
    texts = [row[: next((i + 1 for i, t in enumerate(row) if t in ends), len(row))] for row in rows]
    scores = out.sequences_scores.tolist() if options["num_beams"] > 1 else None
    return {"table": which, "prompt": prompt, "options": options, "tokens": texts, "scores": scores}


def warpers() -> list[dict[str, Any]]:
    """Each warper alone with several values, then together."""
    rng = random.Random(2)
    choices: dict[str, list[float]] = {
        "temperature": [0.5, 0.9, 1.7],
        "top_k": [1, 5, 12],
        "top_p": [0.3, 0.8, 0.95],
        "min_p": [0.02, 0.1, 0.5],
        "typical_p": [0.2, 0.7, 0.95],
    }
    alone = [{name: value} for name, values in choices.items() for value in values]
    names = list(choices)
    together = [{n: rng.choice(choices[n]) for n in rng.sample(names, rng.randint(2, 5))} for _ in range(40)]
    return alone + together


def shape(seed: int, options: dict[str, Any]) -> dict[str, Any]:
    """Probabilities that `transformers` draws from, for one row of logits."""
    logits = (torch.randn(1, 30, generator=torch.Generator().manual_seed(seed)) * 2 * 4096).round() / 4096
    scores = logits
    for name, make in (
        ("temperature", TemperatureLogitsWarper),
        ("top_k", TopKLogitsWarper),
        ("top_p", TopPLogitsWarper),
        ("min_p", MinPLogitsWarper),
        ("typical_p", TypicalLogitsWarper),
    ):
        if name in options:
            scores = make(options[name])(torch.zeros(1, 1, dtype=torch.long), scores)
    return {"options": options, "logits": logits[0].tolist(), "probabilities": scores.softmax(-1)[0].tolist()}


if __name__ == "__main__":
    main()
