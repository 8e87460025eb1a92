"""Tokenizers of the kinds that T5 and BERT use, made of texts; the same texts always give the same one.

`tokenizers` trains both kinds too, but breaks ties by the order of a hash table, which differs from run to run.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

# Every tokenizer writes these, as the released ones do: the engine refuses a text that it cannot write.
PRINTABLE = [chr(code) for code in range(33, 127)]
NAMES = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
_SPECIAL = list(NAMES.values())


def unigram(texts: Iterable[str], parts: bool = False) -> Tokenizer:
    """Whole words with their log-probabilities, and single characters for every other word; </s> (1) ends a text, <pad> is 0.

    `parts`: the beginnings and ends of words are pieces too.
    """
    counts = Counter(f"▁{word}" for line in texts for word in line.split())
    if parts:
        for word, n in list(counts.items()):
            counts.update({part: n for i in range(2, len(word)) for part in (word[:i], word[i:])})
    total = sum(counts.values())
    pieces = sorted((piece, math.log(n / total)) for piece, n in counts.items() if n > 1)
    known = {piece for piece, _ in pieces}
    letters = [(letter, -15.0) for letter in ("▁", *PRINTABLE) if letter not in known]
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -30.0)]
    tokenizer = Tokenizer(models.Unigram([*special, *pieces, *sorted(letters)], unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return tokenizer


def word_piece(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """BERT's, lower case. Every printable character is a piece; letters and digits may also continue a word."""
    normalizer, pre_tokenizer = normalizers.BertNormalizer(lowercase=True), pre_tokenizers.BertPreTokenizer()
    learner = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    learner.normalizer, learner.pre_tokenizer = normalizer, pre_tokenizer
    letters = [letter for letter in PRINTABLE if not letter.isupper()]
    inside = [f"##{letter}" for letter in letters if letter.isalnum()]
    # Given as special tokens, the characters have their ids before the words are counted.
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size, special_tokens=[*_SPECIAL, *letters, *inside], show_progress=False
    )
    learner.train_from_iterator(texts, trainer)
    tokenizer = Tokenizer(models.WordPiece(learner.get_vocab(), unk_token="[UNK]"))
    tokenizer.add_special_tokens(_SPECIAL)
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, pre_tokenizer
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(name, tokenizer.token_to_id(name)) for name in ("[CLS]", "[SEP]")],
    )
    return tokenizer
