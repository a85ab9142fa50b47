"""The Python API: what lmx.load gives back of a run directory and of Hugging Face directories, written by hand."""

from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from goldens import Golden, load_golden

import lmx
from lmx import config
from lmx.checkpoint.checkpointer import Checkpointer
from lmx.checkpoint.config import CheckpointConfig
from lmx.checkpoint.huggingface import export_params
from lmx.data.tokenizer import train_bpe
from lmx.errors import UserError
from lmx.experiment import Experiment, RunDir
from lmx.models.families.llama import Llama
from lmx.models.model import Inputs
from lmx.sharding.mesh import MeshConfig
from tests.jitted import apply, init_params, logits, task


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
    options = {"max_new_tokens": 20, "seed": 5, "temperature": 0.5, "top_k": 4, "stop": ["zzz"]}
    pieces = list(model.stream(["a tale"], **options))
    whole = model.generate(["a tale"], **options)[0]
    assert "".join(p[0] for p in pieces) == whole.text
    assert len(pieces) > 1
    with pytest.raises(TypeError, match="temprature"):
        next(model.stream(["a tale"], temprature=0))


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
    with pytest.raises(UserError, match="there is no directory"):
        lmx.load(tmp_path / "nowhere")


def hf(name: str, directory: Path, dtype: object = None) -> Golden:
    """A golden model, written as a Hugging Face directory."""
    golden = load_golden(name)
    export_params(golden.config, golden.params, directory, golden.config_json, dtype=dtype)
    return golden


@pytest.mark.parametrize("name", ["gpt2", "roberta", "t5"])
def test_hugging_face_directories_give_the_references_logits(name, tmp_path):
    golden = hf(name, tmp_path / "model")
    model = lmx.load(tmp_path / "model")
    more = [golden.arrays["decoder_tokens"][:1]] if golden.spec.encoder else []  # the first row has no padding
    np.testing.assert_allclose(model.logits(golden.tokens[:1], *more), golden.logits[:1], atol=1e-4)
    assert model.tokenizer is None
    with pytest.raises(UserError, match="has no tokenizer"):
        model.embed(["text"])


@pytest.mark.parametrize("name", ["llama_sequence", "bert_token", "modernbert_span", "bart_sequence"])
def test_task_heads_give_the_references_scores(name, tmp_path):
    golden = hf(name, tmp_path / "model")
    model = lmx.load(tmp_path / "model")
    np.testing.assert_allclose(model.scores(golden.tokens[:1]), golden.arrays["task"][:1], atol=1e-4)
    with pytest.raises(UserError, match="no head that predicts tokens"):
        model.logits(golden.tokens[:1])


def test_bfloat16_stays_and_is_computed_in(tmp_path):
    golden = hf("llama", tmp_path / "model", jnp.bfloat16)
    model, wide = lmx.load(tmp_path / "model"), lmx.load(tmp_path / "model", dtype="float32")
    assert {a.dtype for a in jax.tree.leaves(model.params)} == {jnp.dtype(jnp.bfloat16)}
    assert {a.dtype for a in jax.tree.leaves(wide.params)} == {jnp.dtype("float32")}
    low, high = model.logits(golden.tokens[:1]), wide.logits(golden.tokens[:1])
    assert low.dtype == high.dtype == jnp.float32
    assert 0 < np.abs(low - high).max() < 0.1 * np.abs(high).max()


def test_a_mesh_changes_where_and_not_what(run, tmp_path):
    golden = hf("llama", tmp_path / "model")
    for path, tokens in ((tmp_path / "model", golden.tokens[:1]), (run.path, np.array([[1, 2, 3]]))):
        one, many = lmx.load(path), lmx.load(path, mesh=MeshConfig(fsdp=2, tensor=2))
        kernel = many.params["stack"]["segment_0"]["block_0"]["mlp"]["up"]["kernel"]
        assert kernel.sharding.shard_shape(kernel.shape) != kernel.shape
        np.testing.assert_allclose(many.logits(tokens), one.logits(tokens), atol=1e-5)
    texts = [model.generate(["a tale"], max_new_tokens=5, temperature=0)[0] for model in (one, many)]
    assert texts[0].tokens == texts[1].tokens
    np.testing.assert_allclose(texts[0].logprobs, texts[1].logprobs, atol=1e-4)
    np.testing.assert_allclose(many.embed(["a tale"]), one.embed(["a tale"]), atol=1e-5)


def test_encoders_embed_pairs_and_do_not_write(tmp_path):
    golden = hf("bert", tmp_path / "model")
    word_piece(tmp_path / "model", golden.config.vocab)
    model = lmx.load(tmp_path / "model")
    pair = model.tokenize([("t5 t6", "t7")])[0]
    assert pair.ids == [1, 5, 6, 2, 7, 2]
    assert pair.types == [0, 0, 0, 0, 1, 1]
    scores = model.scores([("t5 t6", "t7"), "t8"])
    assert scores.shape == (2, 2)
    inputs = replace(Inputs.whole(jnp.array([pair.ids])), types=jnp.array([pair.types]))
    hidden = apply(golden.spec, golden.params, inputs).hidden
    np.testing.assert_allclose(scores[:1], task(golden.spec, golden.params, "nsp", hidden, inputs), atol=1e-5)
    mean = apply(golden.spec, golden.params, Inputs.whole(jnp.array([[1, 8, 2]]))).hidden.mean(1)
    np.testing.assert_allclose(model.embed(["t8", "t5 t6 t7"])[:1], mean, atol=1e-5)
    with pytest.raises(UserError, match="is an encoder and does not generate; call embed"):
        model.generate(["t5"])


def word_piece(directory: Path, vocab: int) -> None:
    """BERT's vocab.txt, of words that say their number."""
    names = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]"]
    (directory / "vocab.txt").write_text("".join(f"{t}\n" for t in names + [f"t{i}" for i in range(5, vocab)]))


def test_chat_and_the_models_own_settings(tmp_path):
    config = Llama(vocab=300, context=64, layers=1, width=16, heads=2, kv_heads=2, head_dim=8, hidden=32)
    params = init_params(config.spec(), jax.random.key(0))
    export_params(config, params, tmp_path / "model", config.to_huggingface())
    tokenizer = train_bpe(iter(["a tale of two cities " * 20]), 300)
    tokenizer.save(tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").write_text("{{ eos_token }}{{ messages[0].content }}{{ more }}")
    (tmp_path / "model" / "generation_config.json").write_text('{"eos_token_id": [0, 299]}')
    model = lmx.load(tmp_path / "model")
    messages = [{"role": "user", "content": "a tale"}]
    assert model.chat_text(messages, more="!") == "<|endoftext|>a tale!"
    answer = model.chat(messages, max_new_tokens=6)
    assert answer == model.generate(["<|endoftext|>a tale"], max_new_tokens=6)[0]
    assert answer == model.chat(messages, max_new_tokens=6, seed=9)  # greedy, as the file says
    assert model.generator.stops == (0, 299)
    first = replace(model, defaults=replace(model.defaults, stops=answer.tokens[:1]))
    stopped = first.chat(messages, max_new_tokens=6)
    assert (stopped.tokens, stopped.text, stopped.finish_reason) == (answer.tokens[:1], "", "stop")
