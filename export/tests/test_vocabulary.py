"""Tokenizers made of texts."""

from __future__ import annotations

from blip2_export import vocabulary
from blip2_export.scenes import drawing
from blip2_export.train import text

LINES = list(text.corpus(40, "vocabulary"))


def test_the_same_texts_give_the_same_word_pieces() -> None:
    first, *others = (vocabulary.word_piece(LINES, 300).to_str() for _ in range(8))
    assert all(other == first for other in others)


def test_every_printable_text_can_be_written() -> None:
    printable = "".join(vocabulary.PRINTABLE)
    for tokenizer, line in (
        (vocabulary.word_piece(LINES, 300), printable.lower() + " x9z"),
        (vocabulary.unigram(LINES), printable),
        (vocabulary.unigram(LINES, parts=True), printable),
    ):
        encoded = tokenizer.encode(line, add_special_tokens=False)
        assert not {"[UNK]", "<unk>"} & set(encoded.tokens)
        written = tokenizer.decode(encoded.ids)
        assert written.replace(" ", "") == line.replace(" ", ""), written


def test_unigram_keeps_words_whole_and_parts_split_unseen_ones() -> None:
    assert vocabulary.unigram(LINES).encode("a red star").tokens == ["▁a", "▁red", "▁star", "</s>"]
    whole, parts = (vocabulary.unigram(LINES, parts).encode("redstar").tokens for parts in (False, True))
    assert len(parts) < len(whole) == 6


def test_word_pieces_know_the_words_of_scenes() -> None:
    tokenizer = vocabulary.word_piece(LINES, 400)
    for colour in drawing.COLOURS:
        assert tokenizer.encode(colour, add_special_tokens=False).tokens == [colour]
