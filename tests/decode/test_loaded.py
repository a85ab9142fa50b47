"""The Python API on a run directory written by hand: what lmx.load gives back."""

import jax
import numpy as np
import pytest

import lmx
from lmx import config
from lmx.checkpoint.checkpointer import Checkpointer
from lmx.checkpoint.config import CheckpointConfig
from lmx.data.tokenizer import train_bpe
from lmx.errors import UserError
from lmx.experiment import Experiment, RunDir
from lmx.models.families.llama import Llama
from lmx.models.model import Inputs, apply, init_params, logits


@pytest.fixture(scope="module", params=["inside", "elsewhere"])
def run(request, tmp_path_factory) -> RunDir:
    root = tmp_path_factory.mktemp("loaded")
    place = "" if request.param == "inside" else str(root / "durable")
    sizes = {"layers": 2, "width": 32, "heads": 4, "kv_heads": 2, "head_dim": 8, "hidden": 64}
    model = Llama(vocab=300, context=64, **sizes)
    experiment = Experiment(model=model, checkpoint=CheckpointConfig(directory=place))
    run = RunDir(root / "run")
    run.path.mkdir()
    config.save(experiment, run.experiment)
    train_bpe(iter(["a tale of two cities " * 20]), 300).save(run.tokenizer)
    with Checkpointer(run.checkpoints_of(experiment), experiment.checkpoint) as checkpointer:
        checkpointer.save(7, {"params": init_params(model.spec(), jax.random.key(3))}, {})
    return run


def test_logits_are_those_of_the_saved_parameters(run):
    model = lmx.load(run.path)
    spec, tokens = model.experiment.model.spec(), np.array([[0, 17, 4, 250]], np.int32)
    params = init_params(spec, jax.random.key(3))
    wanted = logits(spec, params, apply(spec, params, Inputs.whole(tokens)).hidden)[..., :300]
    assert model.step == 7
    assert model.logits(tokens).shape == (1, 4, 300)
    np.testing.assert_allclose(model.logits(tokens), wanted, atol=1e-6)


def test_embed_is_the_mean_of_each_text_alone(run):
    model = lmx.load(run.path)
    texts = ["a tale", "two cities of a tale"]
    together = model.embed(texts)
    assert together.shape == (2, 32)
    for i, text in enumerate(texts):
        np.testing.assert_allclose(together[i], model.embed([text])[0], atol=1e-5)
    assert np.abs(together[0] - together[1]).max() > 1e-3


def test_stream_adds_up_to_generate(run):
    model = lmx.load(run.path)
    pieces = list(model.stream(["a tale"], max_new_tokens=20, seed=5))
    whole = model.generate(["a tale"], max_new_tokens=20, seed=5)[0]
    assert "".join(p[0] for p in pieces) == whole.text


@pytest.mark.parametrize(
    ("tokens", "words"),
    [
        ([1, 2], "expected integers"),
        ([[300]], "outside the vocabulary of 300"),
        ([[1] * 65], "exceed the model's context of 64"),
    ],
)
def test_bad_tokens_are_refused(run, tokens, words):
    with pytest.raises(UserError, match=words):
        lmx.load(run.path).logits(tokens)


def test_bad_prompts_and_runs_are_refused(run, tmp_path):
    model = lmx.load(run.path)
    with pytest.raises(UserError, match="give a list of strings"):
        model.generate("a tale")
    with pytest.raises(UserError, match="2 seeds for 1 prompts"):
        model.generate(["a"], seed=[1, 2])
    with pytest.raises(UserError, match="is not a run directory"):
        lmx.load(tmp_path)
