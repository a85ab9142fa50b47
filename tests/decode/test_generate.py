import copy
from dataclasses import replace

import numpy as np
import pytest

from lmx.data.tokenizer import TextStream
from lmx.decode import generate
from lmx.decode.generate import Row
from lmx.decode.loop import decode_chunk, prefill
from lmx.decode.pace import LIVE, Pace
from lmx.decode.sampling import Sampling
from lmx.errors import UserError

PROMPTS = ("the quick", "three hundred small birds sing in the old", "", "dog while")
GREEDY = Sampling(temperature=0)
NEW = 24


def completions(generator, prompts=PROMPTS, sampling=GREEDY, new=NEW, **options):
    options = {"seeds": range(len(prompts))} | options
    return generator.generate(prompts, max_new_tokens=new, sampling=sampling, **options)


@pytest.fixture(scope="module")
def greedy(generator):
    return completions(generator)


def test_greedy_is_the_argmax_of_the_full_forward(greedy, full_forward):
    for prompt, completion in zip(PROMPTS, greedy, strict=True):
        expected = full_forward(prompt, completion.tokens)
        assert list(completion.tokens) == expected.argmax(-1).tolist()
    assert len({t for c in greedy for t in c.tokens}) > 10  # the model is lively enough to be a test


def test_log_probabilities_are_those_of_the_full_forward(generator, greedy, full_forward):
    drawn = completions(generator, sampling=Sampling(temperature=0.7, top_k=20, repetition_penalty=1.2))
    for prompt, completion in zip(PROMPTS * 2, [*greedy, *drawn], strict=True):
        expected = full_forward(prompt, completion.tokens)
        at_tokens = np.take_along_axis(expected, np.array(completion.tokens)[:, None], axis=1)[:, 0]
        np.testing.assert_allclose(completion.logprobs, at_tokens, atol=1e-4)


def test_completions_are_as_long_as_asked(generator, tokenizer):
    for completion in completions(generator, new=17):  # no multiple of the chunk
        ended = completion.finish_reason == "stop"
        assert completion.tokens[-1] == tokenizer.end_id if ended else len(completion.tokens) == 17
        assert completion.text == tokenizer.decode(completion.tokens)


def test_tokens_that_the_tokenizer_lacks_are_not_written(generator, tokenizer, full_forward):
    """Embedding tables are padded, and their last rows are no tokens. The log-probabilities remain the model's."""
    known = 100
    assert max(max(c.tokens) for c in completions(generator, PROMPTS[:1])) >= known
    fewer = copy.copy(tokenizer)
    fewer.vocab_size = known
    (found,) = completions(replace(generator, tokenizer=fewer), PROMPTS[:1])
    expected = full_forward(PROMPTS[0], found.tokens)
    assert list(found.tokens) == expected[:, :known].argmax(-1).tolist()
    np.testing.assert_allclose(found.logprobs, expected[:, :known].max(-1), atol=1e-4)


def test_draws_depend_on_the_seed(generator):
    one, same, other = (completions(generator, ["the quick"], Sampling(), seeds=[seed])[0].tokens for seed in (5, 5, 6))
    assert one == same
    assert one != other


def test_draws_do_not_depend_on_the_rest_of_the_batch(generator):
    prompts = [f"{word} {n}" for n in range(8) for word in ("the", "quick brown fox", "dog", "sing in the garden")]
    together = completions(generator, prompts, Sampling(), 12)
    order = np.random.default_rng(0).permutation(len(prompts)).reshape(-1, 8).tolist()
    apart = {
        i: completion
        for group in order
        for i, completion in zip(
            group,
            completions(generator, [prompts[i] for i in group], Sampling(), 12, seeds=group),
            strict=True,
        )
    }
    assert len({c.tokens for c in together}) == len(prompts)
    diverged = sum(together[i].tokens != apart[i].tokens for i in range(len(prompts)))
    assert diverged <= 0.01 * len(prompts)


def test_a_stop_token_ends_its_row_only(generator, tokenizer, greedy):
    first, second = greedy[0].tokens, greedy[1].tokens
    at = next(i for i, t in enumerate(first) if i > 2 and t not in first[:i] and t not in second)

    class Ends(type(generator)):
        """Prompts begin as ever; another token ends them."""

        def encode_prompt(self, prompt, index, new):
            return [tokenizer.end_id, *super().encode_prompt(prompt, index, new)[1:]]

    other = copy.copy(tokenizer)
    other.end_id = first[at]
    ended = completions(Ends(generator.spec, generator.params, other), PROMPTS[:2])
    assert ended[0].tokens == first[: at + 1]
    assert ended[0].finish_reason == "stop"
    assert ended[0].text == tokenizer.decode(first[:at])
    assert ended[1].tokens == second
    assert ended[1].finish_reason == "length"


def streamed(generator, chunk, stop=()):
    """The text that each prompt gained, all pieces together, and the rows."""
    options = {"max_new_tokens": NEW, "sampling": GREEDY, "seeds": range(4), "stop": stop, "pace": Pace(chunk)}
    rows, pieces = zip(*generator.stream(PROMPTS, **options), strict=True)
    return ["".join(p) for p in zip(*pieces, strict=True)], rows[-1]


@pytest.mark.parametrize("chunk", [1, 5])
def test_streamed_pieces_make_the_text(generator, greedy, chunk):
    texts, _ = streamed(generator, chunk)
    assert texts == [c.text for c in greedy]


@pytest.mark.parametrize(("seconds", "looks"), [(0.2, [1] * NEW), (0.015, [1, 6, 6, 6, 5]), (1e-4, [1, 16, 7])])
def test_who_reads_along_sees_text_in_time(generator, greedy, monkeypatch, seconds, looks):
    """A token that takes longer comes alone, and more come together the less they take."""
    clock, seen = [0.0], []

    def chunk(*args, **kwargs):
        seen.append(args[3])
        clock[0] += seconds * args[3]
        return decode_chunk(*args, **kwargs)

    monkeypatch.setattr(generate, "decode_chunk", chunk)
    monkeypatch.setattr(generate, "perf_counter", lambda: clock[0])
    texts = [""] * len(PROMPTS)
    options = {"max_new_tokens": NEW, "sampling": GREEDY, "seeds": range(4)}
    for _, news in generator.stream(PROMPTS, pace=LIVE, **options):
        texts = [text + piece for text, piece in zip(texts, news, strict=True)]
    assert texts == [c.text for c in greedy]
    assert seen == looks


def spanning(text: str, boundary: int) -> str:
    """A string of three characters around a boundary of the text, which has not come before."""
    stop = text[boundary - 2 : boundary + 1]
    assert text.find(stop) == boundary - 2
    return stop


@pytest.mark.parametrize("tokens", [3, 5, 10], ids=lambda n: f"after {n} tokens")
def test_a_stop_string_across_tokens_and_chunks(generator, tokenizer, greedy, tokens):
    """Chunks are of five tokens, so after 5 and 10 the string lies across two chunks."""
    text = greedy[0].text
    stop = spanning(text, len(tokenizer.decode(greedy[0].tokens[:tokens])))
    texts, rows = streamed(generator, 5, stop=[stop, "never comes"])
    expected = [c.text[: c.text.find(stop)] if stop in c.text else c.text for c in greedy]
    assert texts == expected == [r.text for r in rows]
    assert rows[0].finish_reason == "stop"
    assert rows[0].tokens == list(greedy[0].tokens[: len(rows[0].tokens)])
    assert tokens < len(rows[0].tokens) <= tokens + 3


def test_text_is_held_back_while_a_stop_string_may_be_coming(tokenizer):
    row = Row(TextStream(tokenizer), frozenset([tokenizer.end_id]), ("garden",), limit=100)
    shown = []
    for token in tokenizer.encode("a gard, a garden wall"):
        row.push(token, -1.0)
        shown.append(row.news())
    assert "".join(shown) == row.text == "a gard, a "
    assert row.finish_reason == "stop"


def test_a_character_of_several_tokens_comes_whole(tokenizer):
    row = Row(TextStream(tokenizer), frozenset([tokenizer.end_id]), (), limit=100)
    shown = []
    for token in [*tokenizer.encode("é日本"), tokenizer.end_id]:
        row.push(token, -1.0)
        shown.append(row.news())
    assert "".join(shown) == "é日本"
    assert all("\ufffd" not in piece for piece in shown)
    assert row.finish_reason == "stop"


def test_another_temperature_compiles_nothing(generator):
    def compiled():
        return prefill._cache_size(), decode_chunk._cache_size()

    completions(generator, sampling=Sampling(temperature=0.7, top_p=0.9))
    before = compiled()
    completions(generator, sampling=Sampling(temperature=1.3, top_p=0.5))
    completions(generator, ["other", "prompts of", "other lengths", "."], Sampling(temperature=0.4, top_k=3))
    assert compiled() == before
    completions(generator, sampling=Sampling(temperature=0.7, min_p=0.1))
    assert compiled() != before


@pytest.mark.parametrize(
    ("prompts", "new", "words"),
    [
        ([], 4, "there is no prompt to continue"),
        (["the"], 0, "max_new_tokens is 0, expected at least 1"),
        (
            ["dog", "the " * 150],
            8,
            r"prompt 1 has 1\d\d tokens, which with 8 new ones exceeds the model's context of 128",
        ),
        (["dog"], 127, "prompt 0 has .* exceeds the model's context of 128"),
    ],
)
def test_requests_that_cannot_be_met(generator, prompts, new, words):
    with pytest.raises(UserError, match=words):
        completions(generator, prompts, new=new)


@pytest.mark.parametrize("stop", ["end", [""], ["end", ""]])
def test_stop_strings_that_would_end_everything(generator, stop):
    with pytest.raises(UserError, match="expected a list of strings of at least one character"):
        completions(generator, stop=stop)
