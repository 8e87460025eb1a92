"""A stage-1 bundle in the engine against its reference: matching, embeddings, and greedy captions where it writes."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from blip2_export.check.comparison import Comparison
from blip2_export.engine import run_engine
from blip2_export.read import adapter
from blip2_export.reference.retrieval import TEXTS, Reference


def compare(
    checkpoint: Path, bundle: Path, engine: Path, pictures: list[tuple[Any, Path]], max_new_tokens: int
) -> Comparison:
    """`pictures`: each with the file that the engine reads."""
    facts = json.loads((bundle / "bundle.json").read_text())
    model, out = Reference(adapter.open_folder(checkpoint), facts), Comparison()
    paths = [str(path) for _, path in pictures]
    features = [model.features(model.prepare(picture)) for picture, _ in pictures]
    images = [model.image(seen)[1] for seen in features]
    told = ("--model", str(bundle))
    for path, seen, image in zip(paths, features, images, strict=True):
        for row, text in zip(run_engine(engine, "match", "--json", *told, path, *TEXTS), TEXTS, strict=True):
            wanted = model.match(seen, image, text)
            found = np.array([row["itm_probability"], row["itc_similarity"], row["itm_logit"]])
            logit = wanted["itm_logits"][1]
            off = (np.abs(found - [wanted["probability"], wanted["itc"], logit]) / [1, 1, max(1, abs(logit))]).max()
            out.within(float(off), f"match {Path(path).name} {text!r}")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "found.npy"

        def embed(*typed: str) -> np.ndarray:
            run_engine(engine, "embed", *told, "--npy", str(file), *typed)
            return np.load(file)

        out.close(embed("image", "--per-query", *paths), images, "embed image --per-query")
        out.close(embed("image", *paths), [_pooled(image) for image in images], "embed image")
        out.close(embed("text", *TEXTS), [model.text(model.encode(text))[0] for text in TEXTS], "embed text")
        pairs = [model.matching(features[0], model.encode(text))[1] for text in TEXTS]
        out.close(embed("pair", paths[0], *TEXTS), pairs, "embed pair")
    if "caption" in facts["tasks"]:
        greedy = ("--json", "--beams", "1", "--max-new-tokens", str(max_new_tokens))
        for i, row in enumerate(run_engine(engine, "caption", *told, *greedy, *paths)):
            _, _, tokens, text = model.write(features[i], max_new_tokens)
            out.cases += 1
            out.written.add(tuple(tokens))
            if (row["tokens"], row["text"]) != (tokens, text):
                out.differences.append(f"caption of picture {i}: {row['tokens']}, reference {tokens}")
    return out


def _pooled(queries: np.ndarray) -> np.ndarray:
    """The mean over the queries, of length 1."""
    mean = queries.mean(0)
    return np.asarray(mean / np.linalg.norm(mean))
