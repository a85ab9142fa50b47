"""Where the words of real tokens begin."""

import numpy as np
import pytest

from lmx.data.tokenizer import TextTokenizer, train_bpe
from lmx.objectives.vocabulary import Vocabulary

TEXT = "the quick brown fox jumps over the lazy dog can't f(x1) == snake_case; don't "


@pytest.fixture(scope="module")
def tokenizer() -> TextTokenizer:
    return train_bpe(iter([TEXT * 50]), 320, ("[MASK]",))


def in_word(character: str) -> bool:
    return character.isalnum() or character == "_"


def test_words_of_tokens_begin_where_words_of_the_text_do(tokenizer: TextTokenizer) -> None:
    text = "the quick fox can't f(x1) == snake_case; zebra café\n日本 (naïve)"
    (found,) = tokenizer.encode_spans([text])
    expected, seen = list[bool](), 0
    for start, end in found.spans:
        inside = start > 0 and in_word(text[start - 1]) and in_word(text[start])
        expected.append(not inside and start >= seen)  # a token may be a part of a character
        seen = end
    starts = Vocabulary.of(tokenizer, ["[MASK]"]).word_starts(np.array(found.ids))
    assert starts.tolist() == expected
    pieces = [tokenizer.decode(part) for part in np.split(np.array(found.ids), np.flatnonzero(starts)[1:])]
    assert pieces[:5] == ["the", " quick", " fox", " can", "'t"]
    assert {" snake_case", "(x1", "zebra", " café", "日本"} <= set(pieces)
