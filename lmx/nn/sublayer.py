"""A sublayer: a module of the residual stream, with the norms that stand around it."""

import abc
from collections.abc import Mapping
from dataclasses import dataclass

import jax

from lmx.kernels.masks import Mask
from lmx.nn.module import Params, Part
from lmx.nn.norm import Norm


@dataclass(frozen=True)
class Scores:
    """What attention computes beside its weights: how wide, and over which positions.

    Attributes:
      dims: what one query multiplies one position's keys and values by, over all heads: heads * (key width + value
        width).
      mask: which positions it sees.
      memory: whether those are the encoder's.
    """

    dims: int
    mask: Mask
    memory: bool = False


@dataclass(frozen=True)
class Sublayer(abc.ABC):
    """Base class of the sublayers' specs: ``x = norm_residual(x + norm_out(f(norm_in(x))))``, each norm optional.

    ``norm_in`` alone is the pre-norm of GPT-2 and Llama, ``norm_residual`` the post-norm of the original
    Transformer, ``norm_out`` that of OLMo-2, and ``norm_in`` with ``norm_out`` a sandwich.
    """

    norm_in: Norm | None = None
    norm_out: Norm | None = None
    norm_residual: Norm | None = None
    dropout: float = 0.0
    """Dropout on the sublayer's output."""
    std: float = 0.02
    """Standard deviation of the initial kernels."""
    out_std: float = 0.02
    """Standard deviation of the initial output kernel, the one that writes to the residual stream."""

    @property
    @abc.abstractmethod
    def name(self) -> str:
        """The sublayer's key in the parameters."""

    @abc.abstractmethod
    def inner(self, width: int) -> Part:
        """The module ``f``: (hidden [batch, length, width], context) -> SublayerOutput."""

    def cache_streams(self, batch: int, slots: int, memory: int = 0) -> dict[str, tuple[int, ...]]:
        """The shapes of the streams that this sublayer caches while decoding, by name; none by default.

        ``slots`` positions of the sequence, ``memory`` positions of the encoder's.
        """
        return {}

    @property
    def scores(self) -> Scores | None:
        """How it attends; None where it does not, and where only its :attr:`parts` do."""
        return None

    @property
    def parts(self) -> dict[str, "Sublayer"]:
        """The sublayers that this one runs, by their key in its parameters; itself, under no key, by default."""
        return {"": self}

    @property
    def draws(self) -> bool:
        """Whether it draws anything at random in training."""
        return self.dropout > 0

    def by_rows(self, training: bool) -> str:
        """What of it goes by whole sequences, which then cannot be computed in parts; "" for nothing."""
        return ""

    def used(self, name: str) -> float:
        """The share of a parameter (its path within the sublayer, as ``query/kernel``) that one token goes through."""
        return 1.0

    def stepped(self, params: Params, told: Mapping[str, jax.Array]) -> Params:
        """The parameters after a train step, where some are moved by a rule rather than by the gradient.

        ``params`` are stacked ([layers, ...]), ``told`` what the sublayer told in that step, [layers, ...] too.
        """
        return params


@dataclass(frozen=True)
class Attending(Sublayer):
    """Base class of the sublayers that attend."""

    attention_dropout: float = 0.0
    """Dropout on the attention probabilities."""

    @property
    def draws(self) -> bool:
        """Also attention probabilities."""
        return super().draws or self.attention_dropout > 0

    def by_rows(self, training: bool) -> str:
        """Dropout of the probabilities."""
        return "dropout of attention probabilities" if training and self.attention_dropout else ""
