"""What stands on the last hidden states: the prediction of tokens, and the heads of other tasks."""

import abc
import functools
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from lmx.nn.activation import ACTIVATIONS, Activation
from lmx.nn.context import Context
from lmx.nn.linear import Linear
from lmx.nn.module import Declarations, Part, dropout, parameter
from lmx.nn.norm import Norm, build_norm


@dataclass(frozen=True)
class Transform:
    """``norm(activation(x @ kernel + bias))``, as wide as its input: what BERT puts before its predictions."""

    activation: Activation = "gelu"
    norm: Norm | None = None
    bias: bool = True
    dropout: float = 0.0
    """Dropout on its input."""
    std: float = 0.02


class TransformModule(nnx.Module):
    """[..., embed] -> [..., embed]."""

    def __init__(self, spec: Transform, width: int, declared: Declarations):
        self.spec = spec
        self.dense = Linear((width,), (width,), ("embed", None), std=spec.std, bias=spec.bias, declared=declared)
        self.norm = build_norm(spec.norm, width, declared)

    def __call__(self, x: jax.Array, key: jax.Array | None = None) -> jax.Array:
        x = ACTIVATIONS[self.spec.activation](self.dense(dropout(x, self.spec.dropout, key)))
        return x if self.norm is None else self.norm(x)


@dataclass(frozen=True)
class Head:
    """Logits of tokens: ``softcap * tanh((scale * transform(x) @ table.T + bias) / softcap)``."""

    vocab: int
    """Rows of the table, padding included."""
    tied: bool = False
    """The table is the embedding's."""
    transform: Transform | None = None
    bias: bool = False
    softcap: float | None = None
    scale: float = 1.0
    std: float = 0.02

    def part(self, width: int) -> Part:
        """The module that holds the head's parameters."""
        return Part(functools.partial(HeadModule, self, width))


class HeadModule(nnx.Module):
    """[batch, length, embed] -> what the table multiplies; holds ``table`` [vocab, embed] and ``bias`` [vocab]."""

    def __init__(self, spec: Head, width: int, declared: Declarations):
        self.scale = spec.scale
        init = nnx.initializers.normal(spec.std)
        self.transform = None if spec.transform is None else TransformModule(spec.transform, width, declared)
        self.table = None if spec.tied else parameter(declared, (spec.vocab, width), ("vocab", "embed"), init)
        self.bias = parameter(declared, (spec.vocab,), ("vocab",), nnx.initializers.zeros) if spec.bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x if self.transform is None else self.transform(x)
        return x if self.scale == 1 else x * jnp.asarray(self.scale, x.dtype)


Pool = Literal["first", "last", "mean"]
"""What stands for a row: its first token, its last, or the mean over its tokens; padding is none of them."""


@dataclass(frozen=True)
class TaskHead(abc.ABC):
    """Base class of the heads beside token prediction."""

    name: str
    """The head's key in the parameters, under ``tasks``."""
    outputs: int = 2
    """Classes; 0 gives the transformed states themselves: an embedding."""
    transform: Transform | None = None
    bias: bool = True
    dropout: float = 0.0
    """Dropout on what is classified, the transformed states."""
    std: float = 0.02

    @abc.abstractmethod
    def states(self, hidden: jax.Array, segments: jax.Array) -> jax.Array:
        """What is classified, of hidden states [batch, length, embed] and int32 segments [batch, length]."""

    def part(self, width: int) -> Part:
        """The module: (hidden [batch, length, width], context) -> float32 scores."""
        return Part(functools.partial(TaskModule, self, width))


@dataclass(frozen=True)
class SequenceHead(TaskHead):
    """One answer a row: [batch, outputs]. Classification, regression (one output), BERT's next sentence."""

    pool: Pool = "first"

    def states(self, hidden: jax.Array, segments: jax.Array) -> jax.Array:
        """[batch, embed]."""
        return pooled(hidden, segments, self.pool)


@dataclass(frozen=True)
class TokenHead(TaskHead):
    """An answer for each token: [batch, length, outputs]. Named entities; with two outputs (start, end), spans."""

    def states(self, hidden: jax.Array, segments: jax.Array) -> jax.Array:
        """[batch, length, embed]."""
        return hidden


class TaskModule(nnx.Module):
    """(hidden [batch, length, embed], context) -> float32 [batch, outputs] or [batch, length, outputs]."""

    def __init__(self, spec: TaskHead, width: int, declared: Declarations):
        self.spec = spec
        linear = functools.partial(Linear, std=spec.std, bias=spec.bias, declared=declared)
        self.transform = None if spec.transform is None else TransformModule(spec.transform, width, declared)
        self.out = linear((width,), (spec.outputs,), ("embed", "classes")) if spec.outputs else None

    def __call__(self, hidden: jax.Array, context: Context) -> jax.Array:
        x = self.spec.states(hidden, context.segments)
        x = x if self.transform is None else self.transform(x, context.fold(0).key)
        x = dropout(x, self.spec.dropout, context.fold(1).key)
        return (x if self.out is None else self.out(x)).astype(jnp.float32)


def pooled(hidden: jax.Array, segments: jax.Array, pool: Pool) -> jax.Array:
    """[batch, length, embed] -> [batch, embed]; padding (segment 0) is passed over."""
    real = segments > 0
    if pool == "mean":
        weights = real[..., None].astype(jnp.float32)
        return ((hidden * weights).sum(1) / jnp.maximum(weights.sum(1), 1)).astype(hidden.dtype)
    length = segments.shape[1]
    at = real.argmax(1) if pool == "first" else length - 1 - real[:, ::-1].argmax(1)
    return jnp.take_along_axis(hidden, at[:, None, None], axis=1)[:, 0]
