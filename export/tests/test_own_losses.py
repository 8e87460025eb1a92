"""Each loss of training on own data against its formula, written plainly, in float64 on fixed tensors."""

from __future__ import annotations

import math
import random
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from stage1_reference import HUGGING_FACE
from stage1_reference import Stage1 as Formulas
from torch import Tensor, nn
from transformers import Blip2QFormerConfig

from blip2_export.check import random_checkpoint
from blip2_export.train.own import language
from blip2_export.train.own.base import Base, open_base
from blip2_export.train.own.language import Text
from blip2_export.train.own.loop import Fit, Run, Schedule, Task
from blip2_export.train.own.stage1 import Captions, Stage1, drawn
from blip2_export.train.own.stage2 import Stage2, Written
from blip2_export.train.qformer import QFormer

N, LENGTH, WORDS, QUERIES, HEADS, SEEN = 6, 7, 30, 3, 2, 10
PICTURES = (0, 1, 2, 3, 1, 5)  # rows 1 and 4 are of one picture
FAMILIES = {"opt": "odd-3", "t5": "t5"}
CLOSE = 1e-9


def drawn_anew(module: nn.Module, seed: int = 2) -> nn.Module:
    """No parameter is left at a value that hides what it does."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in module.named_parameters():
        noise = torch.randn(p.shape, generator=generator, dtype=torch.float64)
        centre = 1.0 if "norm" in name.lower() and name.endswith("weight") else 0.0
        p.data = centre + 0.4 * noise.to(p.dtype) if p.ndim else p.data
    return module


def qformer(n_layers: int = 3, seen: int = SEEN, width: int = 12) -> QFormer:
    cfg = Blip2QFormerConfig(
        vocab_size=WORDS,
        hidden_size=width,
        num_hidden_layers=n_layers,
        num_attention_heads=HEADS,
        intermediate_size=20,
        max_position_embeddings=16,
        encoder_hidden_size=seen,
        use_qformer_text_input=True,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return drawn_anew(QFormer(cfg, QUERIES, joint_width=5).double())  # type: ignore[return-value]


def formulas(made: QFormer) -> tuple[Formulas, dict[str, Tensor]]:
    """The reference over weights of its own, by the names that `made` has for them."""
    there = {"transform.0.": "cls.predictions.transform.dense.", "transform.2.": "cls.predictions.transform.LayerNorm."}
    own = {name: p.detach().clone().requires_grad_(True) for name, p in made.named_parameters()}
    weights = {}
    for name, value in own.items():
        start = next((s for s in there if name.startswith(s)), "")
        weights[there.get(start, "") + name.removeprefix(start)] = value
    weights["cls.predictions.bias"] = own["head_bias"]
    return Formulas(weights, HUGGING_FACE, HEADS), own


def captions(seed: int = 5) -> Captions:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.tensor([7, 4, 5, 3, 6, 2])
    mask = (torch.arange(LENGTH)[None] < lengths[:, None]).long()
    ids = torch.randint(1, WORDS - 1, (N, LENGTH), generator=generator) * mask
    features = torch.randn(N, 4, SEEN, generator=generator, dtype=torch.float64)
    return Captions(features, ids, mask, torch.tensor(PICTURES), torch.rand(N, 2, generator=generator))


def smooth(log: Tensor, target: int, among: list[int]) -> Tensor:
    """0.9 of the true one, 0.1 spread over all that it could be."""
    return -(0.9 * log[target] + 0.1 * torch.stack([log[j] for j in among]).mean())


def contrast(ref: Formulas, batch: Captions, temperature: Tensor) -> tuple[Tensor, Tensor]:
    """ITC of the batch, and the similarities [picture, text] over the temperature."""
    image, text = ref.image(batch.features), ref.text_embeds(batch.ids, batch.mask)[:, 0]
    rows = [[(image[i] @ text[j]).max() / temperature for j in range(N)] for i in range(N)]
    sim, losses = torch.stack([torch.stack(row) for row in rows]), []
    for one in (sim, sim.T):
        for i in range(N):
            among = [j for j in range(N) if j == i or PICTURES[j] != PICTURES[i]]
            log = one[i] - torch.logsumexp(one[i, among], 0)
            losses.append(smooth(log, i, among))
    return torch.stack(losses).mean(), sim


def negative(scores: Tensor, row: int, chance: float) -> int:
    """By the softmax over rows of other pictures: the first at which the sum passes the chance."""
    others = [j for j in range(N) if PICTURES[j] != PICTURES[row]]
    weights = [math.exp(float(scores[j])) for j in others]
    passed = 0.0
    for j, weight in zip(others, weights, strict=True):
        passed += weight / sum(weights)
        if chance < passed:
            return j
    return others[-1]


def match(ref: Formulas, batch: Captions, sim: Tensor) -> Tensor:
    losses = []
    for i in range(N):
        text, image = (negative(s[i], i, float(batch.chances[i, k])) for k, s in enumerate((sim, sim.T)))
        for picture, words, is_true in ((i, i, 1), (image, i, 0), (i, text, 0)):
            logits, _ = ref.match(batch.features[picture][None], batch.ids[words][None], batch.mask[words][None])
            losses.append(torch.logsumexp(logits[0], 0) - logits[0, is_true])
    return torch.stack(losses).mean()


def generate(ref: Formulas, batch: Captions) -> Tensor:
    """Every token from those before it; `[DEC]` stands where `[CLS]` was, padding says nothing."""
    losses = []
    for i in range(N):
        length = int(batch.mask[i].sum())
        ids = torch.cat([torch.tensor([WORDS - 1]), batch.ids[i, 1:length]])
        log = ref.writing_logits(batch.features[i][None], ids[None])[0].log_softmax(-1)
        losses += [smooth(log[t], int(ids[t + 1]), list(range(WORDS))) for t in range(length - 1)]
    return torch.stack(losses).mean()


def test_stage_1_is_its_three_formulas() -> None:
    made, batch = qformer(), captions()
    losses = Stage1(made, SimpleNamespace(bos_token_id=WORDS - 1))(batch)
    ref, own = formulas(made)
    itc, sim = contrast(ref, batch, own["temperature"])
    wanted = {"itc": itc, "itm": match(ref, batch, sim.detach()), "itg": generate(ref, batch)}
    for name, value in wanted.items():
        assert float(losses[name].detach()) == pytest.approx(float(value.detach()), rel=CLOSE), name
    torch.stack([losses[name] for name in wanted]).sum().backward()
    torch.stack(list(wanted.values())).sum().backward()
    for name, p in made.named_parameters():
        given = own[name].grad
        assert p.grad is not None and given is not None, name
        scale = max(float(given.abs().max()), 1e-3)
        # Word 0 is padding, which is never learnt.
        rows = slice(1, None) if name.endswith("word_embeddings.weight") else slice(None)
        found, given = (g[rows] if g.ndim else g for g in (p.grad, given))
        assert float((found - given).abs().max()) <= CLOSE * scale, name


def test_the_temperature_learns_what_itc_says() -> None:
    """Its gradient against a difference quotient, and not 0."""
    made, batch, h = qformer(), captions(), 1e-6
    model = Stage1(made, SimpleNamespace(bos_token_id=WORDS - 1))
    (gradient,) = torch.autograd.grad(model(batch)["itc"], made.temperature)
    with torch.no_grad():
        sides = []
        for shift in (h, -h):
            made.temperature += shift
            sides.append(float(model(batch)["itc"]))
            made.temperature -= shift
    assert float(gradient) == pytest.approx((sides[0] - sides[1]) / (2 * h), rel=1e-5) and abs(float(gradient)) > 1e-3


def test_no_negative_is_of_the_same_picture() -> None:
    """Whatever the chance."""
    same = torch.tensor(PICTURES)[:, None] == torch.tensor(PICTURES)[None]
    weights = torch.rand(N, N, generator=torch.Generator().manual_seed(0)) * ~same
    for chance in (0.0, 0.3, 1 - 2**-24):
        found = drawn(weights, torch.full((N,), chance))
        assert all(PICTURES[int(j)] != PICTURES[i] for i, j in enumerate(found)), chance


def test_where_there_is_no_other_picture_true_pairs_alone_are_matched() -> None:
    made, batch = qformer(), captions()
    batch.picture[:] = 3
    losses, (ref, _) = Stage1(made, SimpleNamespace(bos_token_id=WORDS - 1))(batch), formulas(made)
    logits = [ref.match(batch.features[i][None], batch.ids[i][None], batch.mask[i][None])[0][0] for i in range(N)]
    wanted = torch.stack([torch.logsumexp(one, 0) - one[1] for one in logits]).mean()
    assert float(losses["itm"].detach()) == pytest.approx(float(wanted.detach()), rel=CLOSE)


MASKS = {
    # Of queries (first) and text: who sees whom. Padding is the last place of the text.
    "itm": lambda a, b: True,
    "itg": lambda a, b: b < QUERIES or (a >= QUERIES and b <= a),
}


@pytest.mark.parametrize("name", ["itm", "itg", "itc"])
def test_a_position_depends_on_what_its_mask_lets_it_see(name: str) -> None:
    """One layer, so that what is seen is seen directly: derivatives of every state by every embedding."""
    made = qformer(n_layers=1)
    n, text = QUERIES + 4, 4
    embedded = torch.randn(1, n, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    mask, ids = torch.tensor([[1, 1, 1, 0]]), torch.tensor([[1, 2, 3, 0]])
    features = torch.randn(1, 4, SEEN, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    states: list[Tensor] = []
    made.qformer.register_forward_hook(lambda _m, _i, out: states.append(out.last_hidden_state))
    if name == "itc":  # two passes: neither has the other's places
        made.query_tokens = nn.Parameter(embedded[:, :QUERIES].detach().clone())
        made.queries(features)
        made.text(ids, mask)
        assert [state.shape[1] for state in states] == [QUERIES, text]
        return
    made.embeddings.forward = lambda *_, **__: embedded  # type: ignore[method-assign]
    made.matching_logits(features, ids, mask) if name == "itm" else made.captioning(features, ids, mask)
    weight = torch.randn(12, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    for a in range(n - 1):
        (by,) = torch.autograd.grad((states[0][0, a] * weight).sum(), embedded, retain_graph=True)
        for b in range(n):
            sees = b < n - 1 and MASKS[name](a, b)
            assert (float(by[0, b].abs().max()) > 1e-12) == sees, (name, a, b)


# Stage 2 and questions


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Base]:
    root = tmp_path_factory.mktemp("losses")
    for family, shape in FAMILIES.items():
        random_checkpoint.write(root / family, shape, seed=4)
    found = {family: open_base(root / family) for family in FAMILIES}
    for base in found.values():
        base.model.double()
    return found


ROWS = [
    Text(0, "", "a red star left of a blue ring"),
    Text(1, "two dogs", "play on the beach"),
    Text(1, "Question: how many objects are there? Answer:", "three", 0.7),
    Text(0, "Question: what colour is the star? Answer:", "red", 0.3),
]


def spoken(base: Base, prefix: Tensor, rows: list[Text]) -> tuple[Tensor, float]:
    """The weighted sum of -log p over what is written, one row after another without padding, and the sum of the weights."""
    model, words = base.model.language_model, base.tokenizer()
    table, total, mass = model.get_input_embeddings(), torch.zeros((), dtype=torch.float64), 0.0

    def ids(text: str, special: bool) -> list[int]:
        return list(words(text, add_special_tokens=special).input_ids)

    for row, soft in zip(rows, prefix, strict=True):
        if base.family == "opt":
            said = ids(f" {row.written}" if row.read else row.written, False) + ids("\n", False)
            read = [2, *(ids(row.read, False) if row.read else [])]
            learnt = ([] if row.read else read) + said
            embeds = torch.cat([soft, table(torch.tensor(read + said))])[None]
            logits = model(inputs_embeds=embeds).logits[0]
            logits = logits[len(embeds[0]) - len(learnt) - 1 : -1]
        else:
            read, learnt = ids(row.read, True), ids(row.written, True)
            assert read[-1] == learnt[-1] == 1, "</s> ends both"
            embeds = torch.cat([soft, table(torch.tensor(read))])[None]
            logits = model(inputs_embeds=embeds, decoder_input_ids=torch.tensor([[0, *learnt[:-1]]])).logits[0]
        log = logits.log_softmax(-1)
        total = total - row.weight * torch.stack([log[t, token] for t, token in enumerate(learnt)]).sum()
        mass += row.weight * len(learnt)
    return total, mass


def second(base: Base, first: QFormer, reads: bool = False) -> Stage2:
    speaks = language.of_family(base.family, base.model.language_model, base.tokenizer())
    made = Stage2(first.qformer, first.query_tokens, speaks)
    made.embeddings = first.embeddings if reads else None
    return drawn_anew(made.double(), seed=6)  # type: ignore[return-value]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("reads", [False, True], ids=["captions", "questions"])
def test_what_the_language_model_says_costs_what_the_formula_says(
    bases: dict[str, Base], family: str, reads: bool
) -> None:
    """Also with a question in the Q-Former, which then sees and is seen by the queries, and is cut off behind it."""
    base, first = bases[family], qformer()
    model = second(base, first, reads)
    texts = model.language.texts(ROWS)
    texts.weights = texts.weights.double()
    seen = torch.randn(2, 4, SEEN, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    ids, mask = (
        torch.tensor([[5, 6, 7], [8, 9, 0], [3, 0, 0], [4, 4, 4]]),
        torch.tensor([[1] * 3, [1, 1, 0], [1, 0, 0], [1] * 3]),
    )
    found = model(Written(seen, texts, ids, mask))["lm"]
    found.backward()
    ref, own = formulas(first)
    by_row = seen[torch.tensor([row.picture for row in ROWS])]
    own["query_tokens"].data.copy_(model.query_tokens)
    states = ref.match(by_row, ids, mask)[1] if reads else ref.queries(by_row)
    projection = model.language_projection
    total, mass = spoken(base, states @ projection.weight.detach().T + projection.bias.detach(), ROWS)
    assert float(found.detach()) == pytest.approx(float(total.detach()) / mass, rel=1e-7)
    (total / mass).backward()
    name = "encoder.layer.0.attention.attention.query.weight"
    assert torch.allclose(model.qformer.get_parameter(name).grad, own[f"qformer.{name}"].grad, rtol=1e-6, atol=1e-9)
    assert torch.allclose(model.query_tokens.grad, own["query_tokens"].grad, rtol=1e-6, atol=1e-9)
    assert all(p.grad is None for p in base.model.language_model.parameters())


def test_a_caption_is_split_after_a_word_from_the_first_to_the_middle_one() -> None:
    words, rng = [f"w{i}" for i in range(9)], random.Random(0)
    cuts = Counter()
    for _ in range(4000):
        read, written = language.split(" ".join(words), rng)
        assert f"{read} {written}" == " ".join(words)
        cuts[len(read.split())] += 1
    assert cuts.keys() == {1, 2, 3, 4} and all(900 < n < 1100 for n in cuts.values())
    assert language.split("one", rng) == ("", "one") and language.split("two words", rng) == ("two", "words")


@pytest.mark.parametrize("family", FAMILIES)
def test_parts_of_a_step_are_one_large_one(bases: dict[str, Base], family: str, tmp_path: Path) -> None:
    """Though their texts are not equally long."""
    seen = torch.randn(2, 4, SEEN, dtype=torch.float64, generator=torch.Generator().manual_seed(3))

    def after(name: str, cuts: list[list[Text]]) -> dict[str, Tensor]:
        model = second(bases[family], qformer())
        parts = [Written(seen, model.language.texts(rows)) for rows in cuts]
        task = Task(model, lambda _: parts, lambda m, part: m(part), mass=lambda part: part.texts.mass)
        fit = Fit(Run(name, tmp_path, Schedule(1, warmup=0, clip=1e9), accumulate=len(parts)), task, Accelerator())
        logged = fit._update(0, parts)
        learnt = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        return learnt | {"lm": torch.tensor(logged["lm"])}

    one, several = after("one", [ROWS]), after("several", [ROWS[:1], ROWS[1:3], ROWS[3:]])
    assert len(one) > 30 and one.keys() == several.keys()
    for name, wanted in one.items():
        assert torch.allclose(several[name], wanted, rtol=1e-5, atol=1e-8), name
