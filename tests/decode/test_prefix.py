"""Decoders that learned to go on with a prefix read a prompt as one: all of it sees all of it."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmx.config import save
from lmx.decode.loaded import Model
from lmx.decode.sources import open_source
from lmx.experiment import Experiment, RunDir
from lmx.models.model import Inputs, apply, logits
from lmx.objectives.denoising import PrefixLm
from lmx.objectives.distillation import Distillation
from lmx.objectives.next_token import NextToken
from lmx.objectives.seq_to_seq import SeqToSeq
from lmx.sharding.layouts import find_layout
from lmx.sharding.mesh import build_mesh
from lmx.sharding.rules import Sharding

PROMPT, NEW, LENGTH = "three hundred small birds", 6, 64


@pytest.fixture(scope="module")
def forward(config, stacked):
    """(prompt, completion, how many tokens are prefix) -> float32 [completion, vocab] log-probabilities, by a forward
    pass over the whole row without a cache."""
    spec = config.spec()

    @jax.jit
    def run(tokens, prefix):
        inputs = replace(Inputs.whole(tokens), prefix=prefix)
        scores = logits(spec, stacked, apply(spec, stacked, inputs).hidden)[0, :, : spec.vocab]
        return jax.nn.log_softmax(scores)

    def after(prompt, completion, prefix):
        row = np.zeros((1, LENGTH), np.int32)
        row[0, : len(prompt) + len(completion)] = [*prompt, *completion]
        scores = np.asarray(run(row, jnp.arange(LENGTH)[None] < prefix))
        return scores[len(prompt) - 1 : len(prompt) + len(completion) - 1]

    return after


@pytest.mark.parametrize("layout", [None, "2d_weight_stationary"])
def test_a_prompt_is_read_in_both_directions(layout, config, stacked, tokenizer, forward):
    sharding = None
    if layout is not None:
        sharding = Sharding(build_mesh(find_layout(layout).mesh, jax.devices()[:4]), find_layout(layout).rules)
    run = Experiment(model=config, objective=PrefixLm())
    model = Model(config, stacked, tokenizer, experiment=run, sharding=sharding)
    (found,) = model.generate([PROMPT], max_new_tokens=NEW, temperature=0)
    prompt = tokenizer.encode(PROMPT)  # no end token before it: in training it is a text's own beginning
    both, causal = (forward(prompt, found.tokens, prefix) for prefix in (len(prompt), 0))
    assert list(found.tokens) == both.argmax(-1).tolist()
    np.testing.assert_allclose(found.logprobs, both.max(-1), atol=1e-4)
    assert np.abs(both - causal).max() > 0.1  # or it would not be a test


def test_what_stands_around_a_prompt_is_what_did_in_training(config, stacked, tokenizer, tmp_path):
    ends, text = tokenizer.end_id, tokenizer.encode("dog")
    wanted = {NextToken(): [ends, *text], PrefixLm(): text, SeqToSeq(): [*text, ends]}
    wanted |= {Distillation(objective=objective): tokens for objective, tokens in wanted.items()}
    for number, (objective, tokens) in enumerate(wanted.items()):
        experiment, run = Experiment(model=config, objective=objective), RunDir(tmp_path / str(number))
        run.path.mkdir()
        save(experiment, run.experiment)
        tokenizer.save(run.tokenizer)
        model = Model(config, stacked, open_source(run.path).tokenizer, experiment=experiment)
        assert model.prompts.encode("dog") == tokens
