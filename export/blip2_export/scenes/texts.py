"""How true what a bundle writes is: its captions and its answers."""

from __future__ import annotations

from collections import Counter

from blip2_export.scenes import drawing
from blip2_export.scenes.held_out import HeldOut


def captions(held: HeldOut) -> float:
    """The share that is true."""
    n_true = 0
    for row, scene in zip(held.engine.rows("caption", *held.pictures), held.scenes, strict=True):
        if drawing.is_true(row["text"], scene):
            n_true += 1
        else:
            held.missed(scene, caption=row["text"])
    return round(n_true / len(held.scenes), 4)


def answers(held: HeldOut) -> dict[str, float]:
    """The share that is right, of all questions and of each kind."""
    right, asked_of = Counter[str](), Counter[str]()
    asked = [[drawing.question(scene, held.rng, kind) for kind in drawing.QUESTION_KINDS] for scene in held.scenes]
    answered = held.each("ask", "question", [[question for _, question, _ in of] for of in asked])
    for scene, questions, rows in zip(held.scenes, asked, answered, strict=True):
        for (kind, question, answer), row in zip(questions, rows, strict=True):
            asked_of[kind] += 1
            right[kind] += row["text"] == answer
            if row["text"] != answer:
                held.missed(scene, question=question, answer=answer, given=row["text"])
    every = round(sum(right.values()) / sum(asked_of.values()), 4)
    return {"answers_right": every, **{kind: round(right[kind] / asked_of[kind], 4) for kind in drawing.QUESTION_KINDS}}
