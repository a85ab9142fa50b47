"""What a sublayer is told beside its input, and what it gives back."""

from dataclasses import dataclass, replace

import jax

from lmx.nn.cache import LayerCache


@dataclass(frozen=True)
class Context:
    """Beside the hidden states [batch, length, embed]: where they stand, and what may be drawn or remembered.

    ``positions`` and ``segments`` are int32 [batch, length]; segment 0 is padding. ``key`` is None when nothing is
    random (evaluation, decoding). ``cache`` is this sublayer's cache, or None.
    """

    positions: jax.Array
    segments: jax.Array
    key: jax.Array | None = None
    cache: LayerCache | None = None

    def fold(self, index: int) -> "Context":
        """The same, with a random key of its own for the part number ``index``."""
        return self if self.key is None else replace(self, key=jax.random.fold_in(self.key, index))


@dataclass(frozen=True)
class SublayerOutput:
    """A sublayer's contribution [batch, length, embed], and its cache with this input written to it."""

    hidden: jax.Array
    cache: LayerCache | None = None
