"""A trained model of the Python API: ``lmx.load(path)``."""

import functools
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from lmx.checkpoint.checkpointer import load_subtree
from lmx.data.tokenizer import TextTokenizer, load_tokenizer
from lmx.decode.generate import Completion, Generator, left_padded
from lmx.decode.sampling import Sampling
from lmx.errors import UserError
from lmx.experiment import Experiment, RunDir
from lmx.models import model
from lmx.models.model import Inputs, cast_floats, param_shapes, unstack_layers
from lmx.nn.module import Params


@dataclass(frozen=True)
class Model:
    """A trained model with its tokenizer.

    Attributes:
      experiment: the run that it comes from.
      params: as saved, float32, layers stacked.
      tokenizer: text <-> tokens.
      step: the checkpoint's step.
    """

    experiment: Experiment
    params: Params
    tokenizer: TextTokenizer
    step: int = 0

    @functools.cached_property
    def generator(self) -> Generator:
        """The decoding form of the model, in the run's compute dtype: layers unstacked once."""
        spec = self.experiment.model.spec()
        ready = jax.jit(lambda p: unstack_layers(spec, cast_floats(p, self.experiment.train.compute)))
        return Generator(spec, ready(self.params), self.tokenizer)

    def logits(self, tokens: Any) -> jax.Array:
        """Float32 [batch, length, vocab] of int32 tokens [batch, length], each row one document without padding.

        Raises:
          UserError: tokens that are not a [batch, length] array of the vocabulary, or rows beyond the context.
        """
        spec, tokens = self.generator.spec, np.asarray(tokens)
        if tokens.ndim != 2 or not np.issubdtype(tokens.dtype, np.integer):
            raise UserError(
                f"tokens have shape {tokens.shape} and dtype {tokens.dtype}, expected integers [batch, length]"
            )
        if tokens.shape[1] > spec.context:
            raise UserError(f"rows of {tokens.shape[1]} tokens exceed the model's context of {spec.context}")
        if tokens.size and not 0 <= tokens.min() <= tokens.max() < spec.vocab:
            raise UserError(f"token {tokens.max()} or {tokens.min()} is outside the vocabulary of {spec.vocab}")
        return _logits(spec, self.generator.params, jnp.asarray(tokens, jnp.int32))

    def generate(
        self,
        prompts: Sequence[str],
        *,
        max_new_tokens: int = 64,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        stop: Sequence[str] = (),
        seed: int | Sequence[int] = 0,
    ) -> list[Completion]:
        """Continues each prompt; see :class:`lmx.decode.sampling.Sampling` for what the numbers mean.

        ``seed`` is one for each prompt, or a single one from which prompt i takes seed + i: what a prompt draws does
        not depend on which others are in the batch.
        """
        sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty)
        return self.generator.generate(
            _prompts(prompts), max_new_tokens=max_new_tokens, sampling=sampling, seeds=_seeds(seed, prompts), stop=stop
        )

    def stream(self, prompts: Sequence[str], *, seed: int | Sequence[int] = 0, **options: Any) -> Iterator[list[str]]:
        """As :meth:`generate`, but yields the text that each prompt has gained, as it comes.

        ``options`` are ``max_new_tokens``, ``stop`` and ``sampling`` (a Sampling).
        """
        options = {"max_new_tokens": 64, "sampling": Sampling(), **options}
        for _, news in self.generator.stream(_prompts(prompts), seeds=_seeds(seed, prompts), **options):
            yield news

    def embed(self, texts: Sequence[str]) -> jax.Array:
        """Float32 [batch, embed]: the mean over each text's tokens of the hidden states after the final norm."""
        encoded = [[self.tokenizer.end_id, *ids] for ids in self.tokenizer.encode_batch(list(_prompts(texts)))]
        longest = max(len(ids) for ids in encoded)
        if longest > self.generator.spec.context:
            raise UserError(
                f"a text has {longest} tokens, more than the model's context of {self.generator.spec.context}"
            )
        return _embed(self.generator.spec, self.generator.params, left_padded(encoded))


@functools.partial(jax.jit, static_argnums=0)
def _logits(spec: Any, params: Params, tokens: jax.Array) -> jax.Array:
    hidden = model.apply(spec, params, Inputs.whole(tokens)).hidden
    return model.logits(spec, params, hidden)[..., : spec.vocab]


@functools.partial(jax.jit, static_argnums=0)
def _embed(spec: Any, params: Params, inputs: Inputs) -> jax.Array:
    hidden = model.apply(spec, params, inputs).hidden.astype(jnp.float32)
    weights = (inputs.segments > 0)[..., None].astype(jnp.float32)
    return (hidden * weights).sum(1) / weights.sum(1)


def _prompts(prompts: Sequence[str]) -> Sequence[str]:
    if isinstance(prompts, str):
        raise UserError("prompts is a single string; give a list of strings")
    return prompts


def _seeds(seed: int | Sequence[int], prompts: Sequence[str]) -> Sequence[int]:
    if isinstance(seed, int):
        return [seed + i for i in range(len(prompts))]
    if len(seed) != len(prompts):
        raise UserError(f"there are {len(seed)} seeds for {len(prompts)} prompts; give one each, or a single one")
    return seed


def load(path: str | os.PathLike[str], *, step: int | None = None) -> Model:
    """The model of a run directory: its averaged parameters if the run averaged them, else its parameters.

    Args:
      path: a run directory.
      step: the checkpoint's step; the newest good one by default.

    Raises:
      UserError: not a run directory, or it has no such checkpoint.
      LmxError: every checkpoint is damaged.
    """
    run = RunDir(Path(path))
    experiment = run.load_experiment()
    part = "ema" if experiment.train.ema else "params"
    restored = load_subtree(run.checkpoints_of(experiment), part, param_shapes(experiment.model.spec()), step)
    return Model(experiment, cast(Params, restored.state), load_tokenizer(run.tokenizer), restored.step)
