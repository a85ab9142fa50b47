"""Scores of held-out rows and their standard errors, of any kind of model."""

import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from evaluated import TEXT

from lmx.data.config import DataConfig, LocalFiles, TokenizerFile
from lmx.data.prepare import prepare
from lmx.data.rows import held_out_rows
from lmx.decode.loaded import Model
from lmx.errors import UserError
from lmx.eval.perplexity import evaluate
from lmx.experiment import Experiment, TrainConfig
from lmx.objectives.denoising import PrefixLm
from lmx.objectives.masked_lm import MaskedLm
from lmx.objectives.next_token import NextToken

LENGTH = 32


@pytest.fixture(scope="module")
def data(decoder: Model, tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    """Some documents, of different lengths and of different words."""
    place, words, rng = tmp_path_factory.mktemp("perplexity"), TEXT.split(), np.random.default_rng(2)
    for index in range(12):
        (place / f"{index}.txt").write_text(" ".join(rng.choice(words[: 3 + index], 20 + 9 * index)))
    assert decoder.tokenizer is not None
    decoder.tokenizer.save(place / "tokenizer")  # type: ignore[attr-defined]
    return DataConfig((LocalFiles(files=(f"{place}/*.txt",)),), TokenizerFile(str(place / "tokenizer")), held_out=1.0)


def row_sums(model: Model, data: DataConfig) -> np.ndarray:
    """Nats, tokens, right ones and bytes of each row, read by itself: float64 [rows, 4]."""
    prepared = prepare(data, progress=False)
    sizes = prepared.tokenizer.token_bytes()
    spec, loss = model.spec, jax.jit(NextToken().loss, static_argnums=0)
    found = []
    for row in held_out_rows(prepared, length=LENGTH):
        sums = loss(spec, model.params, {key: jnp.asarray(a)[None] for key, a in row.items()})
        size = sizes[row["targets"]][row["segment_ids"] > 0].sum()
        found.append([float(sums.nll), float(sums.weight), float(sums.correct), float(size)])
    return np.array(found)


def test_each_number_has_its_error_over_rows(decoder: Model, data: DataConfig) -> None:
    nats, tokens, right, size = (sums := row_sums(decoder, data)).T
    found = evaluate(decoder, data, length=LENGTH, batch=4)
    measures, n = found.result.measures, len(sums)
    assert n % 4  # the last batch is filled up with rows that do not count
    ratios = {"loss": (nats, tokens), "accuracy": (right, tokens), "bits_per_byte": (nats / math.log(2), size)}
    errors = {}
    for name, (above, below) in ratios.items():
        ratio = above.sum() / below.sum()
        # The ratio estimator's standard error, to the first order (Cochran 1977, 6.4).
        errors[name] = math.sqrt(n / (n - 1) * np.square(above - ratio * below).sum()) / below.sum()
        assert measures[name].value == getattr(found, name) == pytest.approx(ratio, rel=1e-5)
        assert measures[name].stderr == pytest.approx(errors[name], rel=0.15)
    assert measures["perplexity"].stderr == pytest.approx(found.perplexity * errors["loss"], rel=0.3)
    assert {m.n for m in measures.values()} == {found.result.n} == {n}
    assert measures["loss"].method == "bootstrap, 500 resamples of the rows, seed 0"
    assert not measures["loss"].higher_is_better
    assert found.result.notes == {"targets": f"{int(tokens.sum()):,}", "bytes of text": f"{int(size.sum()):,}"}
    assert found.result.configuration["objective"]["type"] == "NextToken"


def test_a_mesh_has_the_errors_of_its_smallest_batches(decoder: Model, on_mesh: Model, data: DataConfig) -> None:
    one, many = (evaluate(model, data, length=LENGTH, batch=4) for model in (decoder, on_mesh))
    assert many.loss == pytest.approx(one.loss, rel=1e-5)
    assert many.result.n == -(-one.result.n // 4)
    measure = many.result.measures["loss"]
    assert measure.method == "bootstrap, 500 resamples of the groups of 4 rows, seed 0"
    assert measure.stderr == pytest.approx(one.result.measures["loss"].stderr, rel=0.7)


@pytest.mark.parametrize(("kind", "objective"), [("encoder", MaskedLm()), ("encoder_decoder", PrefixLm())])
def test_a_model_of_no_run_is_scored_on_a_recipes_objective(
    request: pytest.FixtureRequest, data: DataConfig, kind: str, objective: MaskedLm | PrefixLm
) -> None:
    model: Model = request.getfixturevalue(kind)
    recipe = Experiment(objective=objective, train=TrainConfig(length=LENGTH))
    found = evaluate(model, data, recipe=recipe)
    assert found.result.configuration["objective"]["type"] == type(objective).__name__
    assert found.result.configuration["length"] == LENGTH
    assert found.result.measures["loss"].stderr > 0
    as_run = evaluate(replace(model, experiment=replace(recipe, model=model.config)), data)
    assert found.loss == pytest.approx(as_run.loss, rel=1e-6)
    with pytest.raises(UserError, match=r"give --data RECIPE, whose objective says what it is scored on"):
        evaluate(model, data)


def test_an_objective_that_does_not_fit_is_refused(encoder: Model, data: DataConfig) -> None:
    with pytest.raises(UserError, match="objective NextToken predicts each token from those before it, but a bert"):
        evaluate(encoder, data, recipe=Experiment())
