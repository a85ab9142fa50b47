"""What is seen inside of a model agrees with what it computes, layer by layer."""

import json
import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from evaluated import log_softmax
from goldens import Golden, load_golden

from lmx.decode.loaded import Model
from lmx.errors import UserError
from lmx.experiment import Experiment
from lmx.inspect.data import as_data
from lmx.inspect.look import Look, _states, _through, look
from lmx.inspect.page import page
from lmx.inspect.rows import rows_of
from lmx.kernels.attention import attention
from lmx.kernels.masks import SlidingWindow
from lmx.kernels.telling import listening
from lmx.models.model import Inputs, embedded, logits, normed, unstack_layers
from lmx.objectives.denoising import PrefixLm

PROMPT = "the quick brown fox"


@pytest.fixture(scope="module")
def seen(decoder: Model) -> Look:
    return look(decoder, PROMPT)


def test_the_last_layer_of_the_lens_is_the_model(decoder: Model, seen: Look) -> None:
    scores = log_softmax(decoder.logits(seen.rows.tokens)[0])
    targets = [*seen.rows.tokens[0, 1:], scores[-1].argmax()]
    assert seen.targets.tolist() == targets
    own = scores[np.arange(len(targets)), targets]
    np.testing.assert_allclose(seen.lens.logprob[-1], own, atol=1e-4)
    assert seen.lens.rank[-1].tolist() == (scores > own[:, None]).sum(1).tolist()
    np.testing.assert_allclose(seen.lens.entropy[-1], -(np.exp(scores) * scores).sum(1), atol=1e-4)
    np.testing.assert_allclose(seen.lens.top_logprob[-1, :, 0], scores.max(1), atol=1e-4)
    assert seen.lens.logprob.shape == (3, len(targets))


def test_a_layer_of_the_lens_is_the_model_that_ends_there(decoder: Model, seen: Look) -> None:
    shorter = replace(decoder, config=replace(decoder.config, layers=1), params=_first_layer(decoder))
    scores = log_softmax(shorter.logits(seen.rows.tokens)[0])
    own = scores[np.arange(len(seen.targets)), seen.targets]
    np.testing.assert_allclose(seen.lens.logprob[1], own, atol=1e-4)


def _first_layer(model: Model) -> dict:
    stack = jax.tree.map(lambda a: a[:1], model.params["stack"]["segment_0"])
    return {**model.params, "stack": {"segment_0": stack}}


def test_maps_sum_to_one_over_what_is_allowed(seen: Look) -> None:
    (maps,) = seen.attention.values()
    length = seen.rows.tokens.shape[1]
    assert maps.shape == (2, 4, length, length)
    np.testing.assert_allclose(maps.sum(-1), 1, atol=1e-5)
    assert (maps[..., ~np.tri(length, dtype=bool)] == 0).all()
    assert (maps[..., np.tri(length, dtype=bool)] > 0).all()


def test_maps_are_what_attention_mixes_values_by() -> None:
    rng, mask = np.random.default_rng(0), SlidingWindow(3)
    arrays = (rng.normal(size=shape).astype(np.float32) for shape in ((1, 7, 4, 8), (1, 2, 8, 7), (1, 2, 7, 5)))
    query, key, value = arrays
    at, segments = np.arange(7)[None], np.ones((1, 7), np.int32)
    where = {"query_positions": at, "key_positions": at, "query_segments": segments, "key_segments": segments}

    @jax.jit
    def told(query: jax.Array, key: jax.Array, value: jax.Array) -> tuple[jax.Array, jax.Array]:
        with listening() as heard:
            mixed = attention(query, key, value, mask=mask, itself=True, softcap=5.0, **where)
        ((name, maps),) = heard
        assert name == "attention"
        return mixed, maps

    mixed, maps = told(query, key, value)
    scores = 5 * np.tanh(np.einsum("qkgd,kds->kgqs", query.reshape(7, 2, 2, 8), key[0]) / np.sqrt(8) / 5)
    far = np.arange(7)[:, None] - np.arange(7)
    scores = np.exp(np.where((far >= 0) & (far < 3), scores, -np.inf))
    plain = (scores / scores.sum(-1, keepdims=True)).reshape(4, 7, 7)
    np.testing.assert_allclose(maps[0], plain, atol=1e-5)
    by_values = np.einsum("hqs,hsd->qhd", plain, np.repeat(value[0], 2, axis=0))
    np.testing.assert_allclose(mixed[0], by_values, atol=1e-5)


def test_attribution_is_how_a_log_probability_changes_with_a_vector(decoder: Model, seen: Look) -> None:
    spec = decoder.spec
    params, inputs = unstack_layers(spec, decoder.params), Inputs.whole(jnp.asarray(seen.rows.tokens))
    x = embedded(spec, params, None, spec.width, inputs, None)[0]

    @jax.jit
    def grown(step: jax.Array, place: jax.Array) -> jax.Array:
        changed = x.at[0, place].multiply(1 + step)
        hidden = _through(spec, params, None, spec.width, changed, inputs, None)
        return logits(spec, params, normed(spec, params, spec.width, hidden))[0]

    for prediction, place in ((3, 1), (2, 2), (4, 0)):
        target, step = seen.targets[prediction], 1e-2
        up, down = (log_softmax(grown(s, place))[prediction, target] for s in (step, -step))
        slope = (up - down) / (2 * step)
        assert seen.attribution[prediction, place] == pytest.approx(slope, rel=0.03, abs=2e-3)
    # Nothing that comes later speaks for a prediction.
    later = ~np.tri(len(seen.targets), dtype=bool)
    assert (seen.attribution[later] == 0).all()


def test_an_encoder_is_asked_about_each_token_where_it_is_masked(encoder: Model) -> None:
    found = look(encoder, PROMPT)
    tokens, mask = encoder.tokenizer.encode(PROMPT), encoder.tokenizer.token_id("[MASK]")
    assert found.rows.tokens[0].tolist() == [*tokens, encoder.tokenizer.end_id]
    rows = np.repeat(found.rows.tokens[:1], len(tokens), axis=0)
    rows[np.arange(len(tokens)), np.arange(len(tokens))] = mask
    scores = log_softmax(encoder.logits(rows))[np.arange(len(tokens)), np.arange(len(tokens))]
    np.testing.assert_allclose(found.lens.logprob[-1], scores[np.arange(len(tokens)), tokens], atol=1e-4)
    np.testing.assert_allclose(found.attention["self"].sum(-1), 1, atol=1e-5)
    given = rows_of(encoder, "the quick[MASK] fox")
    assert given.targets.tolist() == [-1]
    assert given.tokens[0, given.at[0]] == mask


def test_a_prefix_is_read_as_when_it_is_gone_on_with(decoder: Model) -> None:
    run = Experiment(model=decoder.config, objective=PrefixLm())
    model, prompt = replace(decoder, experiment=run), decoder.tokenizer.encode(PROMPT)
    found, (done,) = look(model, PROMPT), model.generate([PROMPT], max_new_tokens=32, temperature=0)
    assert found.rows.tokens[0].tolist() == [*prompt, *done.tokens]
    assert found.rows.place.tolist() == list(range(len(prompt), len(prompt) + len(done.tokens) + 1))
    assert found.targets[:-1].tolist() == list(done.tokens)
    np.testing.assert_allclose(found.lens.logprob[-1, :-1], done.logprobs, atol=1e-4)
    seen = found.attention["self"].sum((0, 1)) > 0
    allowed = np.tri(len(seen), dtype=bool)
    allowed[:, : len(prompt)] = True
    assert (seen == allowed).all()
    assert (found.attribution[0, len(prompt) :] == 0).all()
    given = rows_of(model, PROMPT, " dog")
    assert given.targets.tolist() == [*decoder.tokenizer.encode(" dog"), -1]


def test_an_encoder_decoder_has_three_kinds_of_maps(encoder_decoder: Model) -> None:
    found = look(encoder_decoder, PROMPT, "lazy dog")
    source, length = found.rows.source.shape[1], found.rows.tokens.shape[1]
    shapes = {kind: maps.shape for kind, maps in found.attention.items()}
    assert shapes == {
        "encoder": (1, 4, source, source),
        "self": (2, 4, length, length),
        "cross": (2, 4, length, source),
    }
    for maps in found.attention.values():
        np.testing.assert_allclose(maps.sum(-1), 1, atol=1e-5)
    scores = log_softmax(encoder_decoder.logits(found.rows.source, found.rows.tokens)[0])
    np.testing.assert_allclose(found.lens.logprob[-1], scores[np.arange(length), found.targets], atol=1e-4)
    assert found.source_attribution.shape == (length, source)
    assert np.abs(found.source_attribution).max() > 0


@pytest.mark.parametrize(
    "name", ["deepseek_v3", *(pytest.param(n, marks=pytest.mark.slow) for n in ("gemma2", "gpt_oss", "palm", "bart"))]
)
def test_other_families_are_seen_too(name: str) -> None:
    golden: Golden = load_golden(name)
    spec, tokens = golden.spec, golden.predicted.tokens[:1]
    source = None if spec.encoder is None else golden.inputs.tokens[:1]
    at = np.arange(tokens.shape[1])
    params = unstack_layers(spec, golden.params)
    read = Inputs.whole(tokens), None if source is None else Inputs.whole(source)
    _, heard, _ = _states(spec, params, *read, np.zeros_like(at), at)
    assert len(heard["attention"]) == len(spec.stack.blocks())
    total = np.asarray(heard["attention"].sum(-1))
    assert (total < 1 + 1e-5).all()
    if name != "gpt_oss":  # whose sinks take a part
        np.testing.assert_allclose(total, 1, atol=1e-5)


def test_the_page_is_whole_and_the_data_plain(decoder: Model, seen: Look) -> None:
    data = as_data(decoder, seen, "a <b>model</b>", PROMPT)
    assert json.loads(json.dumps(data)) == data
    html = page(data, seen)
    assert "<b>model" not in html
    assert not re.search(r"(src|href)\s*=|@import|https?://|fetch\(", html)
    (inside,) = re.findall(r'<script type="application/json" id="seen">(.*?)</script>', html)
    assert json.loads(inside)["predictions"] == data["predictions"]
    first = data["predictions"][0]
    assert first["rank"] == first["lens"][-1]["rank"]
    assert sum(t["logprob"] <= 0 for t in first["top"]) == 5


def test_what_cannot_be_looked_at_is_refused(decoder: Model, classifier: Model, on_mesh: Model) -> None:
    with pytest.raises(UserError, match="the text has 201 tokens, expected 1 to 96"):
        look(decoder, "dog" * 100)
    with pytest.raises(UserError, match="so it takes no target"):
        look(decoder, "the", "dog")
    with pytest.raises(UserError, match="no head that predicts tokens"):
        look(classifier, "the")
    with pytest.raises(UserError, match="load it without one"):
        look(on_mesh, "the")
