"""From an example's content to tokens and labels, against plain references; what stands around texts."""

import random
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmx.data import encoders
from lmx.data.chat import CHATML, ChatTemplate
from lmx.data.framing import Frame, as_prompted
from lmx.data.tokenizer import TextTokenizer, train_bpe
from lmx.errors import UserError

FLAGS: list[dict[str, Any]] = [{}, {"train": True}, {"train": False}, {"weight": 0}, {"weight": 1.0, "train": None}]
WORD = st.text("abcdefgh,.é日", min_size=1, max_size=6)


@pytest.fixture(scope="module")
def tokenizer() -> TextTokenizer:
    texts = [" ".join(random.Random(i).choices(["abc", "bad,", "egg", "deaf", "日é", "a.b"], k=30)) for i in range(40)]
    return train_bpe(iter(texts), 330, ("<|im_start|>", "<|im_end|>"))


def spans_of(tokenizer: TextTokenizer, ids: list[int], text: str) -> list[tuple[int, int]]:
    """The bytes of each token, by decoding: a reference that is slow and plain."""
    sizes = [int(tokenizer.token_bytes()[i]) for i in ids]
    ends = np.cumsum(sizes)
    assert ends[-1] == len(text.encode())
    return [(int(end) - size, int(end)) for end, size in zip(ends, sizes, strict=True)]


@settings(max_examples=40, deadline=None)
@given(words=st.lists(WORD, min_size=1, max_size=8), seed=st.integers(0, 9))
def test_tags_stand_at_the_first_token_of_each_word(tokenizer: TextTokenizer, words: list[str], seed: int) -> None:
    tags = [random.Random(seed + i).choice("ABC") for i in range(len(words))]
    encoder = encoders.TagEncoder(("A", "B", "C"))
    (streams,) = encoder.encode([("place", {"words": words, "labels": tags})], tokenizer)
    text = " ".join(words)
    spans, expected, at = spans_of(tokenizer, list(streams.tokens), text), [0] * len(streams.tokens), 0
    for word, tag in zip(words, tags, strict=True):
        first = next(i for i, (a, b) in enumerate(spans) if b > at and a < at + len(word.encode()))
        expected[first] = expected[first] or 1 + "ABC".index(tag)
        at += len(word.encode()) + 1
    assert list(streams.labels) == expected


@settings(max_examples=40, deadline=None)
@given(words=st.lists(WORD, min_size=2, max_size=12), data=st.data())
def test_answers_are_the_fewest_tokens_that_hold_them(tokenizer: TextTokenizer, words: list[str], data: Any) -> None:
    context = " ".join(words)
    start = data.draw(st.integers(0, len(context) - 1))
    end = data.draw(st.integers(start + 1, len(context)))
    content = {"context": context, "question": "abc bad?", "span": [start, end]}
    (streams,) = encoders.AnswerEncoder().encode([("place", content)], tokenizer)
    spans = spans_of(tokenizer, list(streams.tokens), context)
    a, b = len(context[:start].encode()), len(context[:end].encode())
    inside = [i for i, (x, y) in enumerate(spans) if y > a and x < b]
    assert list(streams.labels) == [inside[0], inside[-1]]
    assert tokenizer.decode(streams.target) == "abc bad?"


@settings(max_examples=30, deadline=None)
@given(contents=st.lists(WORD, min_size=2, max_size=6), flags=st.lists(st.sampled_from(FLAGS), min_size=6, max_size=6))
def test_a_chats_turns_are_the_assistants_words(
    tokenizer: TextTokenizer, contents: list[str], flags: list[dict[str, Any]]
) -> None:
    flags = [{} if i % 2 == 0 else flag for i, flag in enumerate(flags)]
    flags[1] = {}
    messages = [
        {"role": role, "content": text, **flag}
        for role, text, flag in zip(["user", "assistant"] * 3, contents, flags, strict=False)
    ]
    (streams,) = encoders.ChatEncoder(CHATML).encode([("place", {"messages": messages})], tokenizer)
    tokens, labels = np.array(streams.tokens), np.array(streams.labels)
    wanted = [n for n in range(1, len(contents) // 2 + 1) if not {0} & set(flags[2 * n - 1].values())]
    assert sorted(set(labels.tolist()) - {0}) == wanted
    for turn in wanted:
        own = tokens[labels == turn].tolist()
        assert tokenizer.decode(own) == contents[2 * turn - 1]
        assert own[-1] == tokenizer.token_id("<|im_end|>")


def test_turns_that_a_template_joins_cannot_be_left_out_one_by_one(tokenizer: TextTokenizer) -> None:
    joined = "{% generation %}{% for m in messages %}{{ m.content }}{{ m.weight }}{% endfor %}{% endgeneration %}"
    messages: list[dict[str, Any]] = [{"role": "assistant", "content": word, "weight": 1} for word in ("abc", "egg")]
    (streams,) = encoders.ChatEncoder(joined).encode([("place", {"messages": messages})], tokenizer)
    assert (tokenizer.decode(streams.tokens), set(streams.labels)) == ("abcegg", {1})
    messages[0]["weight"] = 0
    with pytest.raises(UserError, match="place: the chat template marks 1 turns of 2 messages of the assistant"):
        list(encoders.ChatEncoder(joined).encode([("place", {"messages": messages})], tokenizer))


def test_turns_without_marks_are_found_or_refused() -> None:
    messages = [
        {"role": r, "content": c} for r, c in (("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))
    ]
    plain = CHATML.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    text, spans = ChatTemplate(plain).turns(messages)
    marked, inner = ChatTemplate(CHATML).turns(messages)
    assert text == marked
    assert [text[a:b] for a, b in inner] == ["b<|im_end|>", "d<|im_end|>"]
    assert [text[a:b] for a, b in spans] == ["b<|im_end|>\n", "d<|im_end|>\n"]
    changing = "{% for m in messages %}{{ m.role if loop.last else 'old' }}:{{ m.content }};{% endfor %}"
    with pytest.raises(UserError, match=r"writes message 2 otherwise .* \{% generation %\}"):
        ChatTemplate(changing).turns(messages)
    upper = "{% set x %}{% generation %}a{% endgeneration %}{% endset %}{{ x | length }}"
    with pytest.raises(UserError, match="changes what it marks"):
        ChatTemplate(upper).turns(messages)


def test_the_end_of_a_turn_is_a_special_token(tokenizer: TextTokenizer) -> None:
    assert ChatTemplate(CHATML).turn_end(tokenizer) == tokenizer.token_id("<|im_end|>")
    assert ChatTemplate("{% for m in messages %}{{ m.content }} {% endfor %}").turn_end(tokenizer) is None


def test_frames_are_what_the_tokenizer_puts_around(tokenizer: TextTokenizer) -> None:
    for around in (as_prompted(tokenizer, before=True), as_prompted(tokenizer, before=False)):
        single, pair = Frame.of(around, 1), Frame.of(around, 2)
        texts = [np.array(around.encode(t), np.int32) for t in ("abc egg", "deaf")]
        one, two = around.encode_prompts(["abc egg"])[0], around.encode_prompts([("abc egg", "deaf")])[0]
        assert single.around(texts[:1]).tokens.tolist() == one.ids
        framed = pair.around(texts)
        assert (framed.tokens.tolist(), framed.types.tolist()) == (two.ids, two.types)
        assert framed.tokens[framed.starts[1] :][: len(texts[1])].tolist() == texts[1].tolist()
        assert as_prompted(around, before=True) is around
