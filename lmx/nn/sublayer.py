"""A sublayer: a module of the residual stream, with the norms that stand around it."""

import abc
from dataclasses import dataclass

from lmx.nn.module import Part
from lmx.nn.norm import Norm


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

    def cache_streams(self, batch: int, slots: int) -> dict[str, tuple[int, ...]]:
        """The shapes of the streams that this sublayer caches while decoding, by name; none by default."""
        return {}
