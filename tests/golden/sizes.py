"""The sizes of the tiny reference models."""

import random
from dataclasses import dataclass


@dataclass(frozen=True)
class Sizes:
    """What every tiny model is made from; each configuration derives its own numbers from these.

    Attributes:
      vocab: tokens, not a multiple of 128 nor even; the first few are special.
      width: of the residual stream, an even number of times the heads.
      heads: query heads.
      kv_heads: key and value heads of the models that have fewer.
      head_dim: of the models whose head_dim is not width / heads.
      hidden: units of the feed-forward layers.
      layers: blocks, or periods where a model has a pattern.
      experts: of a mixture, a multiple of 4.
      length: of the sequences, a multiple of 4; windows and original contexts are fractions of it.
      seed: of parameters and tokens.
    """

    vocab: int = 67
    width: int = 32
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 12
    hidden: int = 40
    layers: int = 2
    experts: int = 4
    length: int = 24
    seed: int = 0

    @property
    def context(self) -> int:
        """Positions that a model declares, more than a sequence has."""
        return 2 * self.length

    @property
    def window(self) -> int:
        """A sliding window that a sequence leaves."""
        return self.length // 3


def sizes_for(seed: int, vary: bool = False, scale: int = 1) -> Sizes:
    """The default sizes, or others drawn from the seed, with widths and vocabulary ``scale`` times as large."""
    draw = random.Random(seed)
    kv_heads = draw.choice([1, 2, 3])
    heads = kv_heads * draw.choice([2, 3, 4])
    varied = Sizes(
        vocab=draw.randrange(71, 331, 2),
        width=heads * draw.choice([6, 8, 10]),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=draw.choice([8, 10, 14, 16]),
        hidden=draw.randrange(30, 90),
        layers=draw.choice([2, 3, 4]),
        experts=draw.choice([4, 8, 12]),
        length=draw.randrange(16, 48, 4),
    )
    base = varied if vary else Sizes()
    return Sizes(
        vocab=base.vocab * scale,
        width=base.width * scale,
        heads=base.heads,
        kv_heads=base.kv_heads,
        head_dim=base.head_dim * scale,
        hidden=base.hidden * scale,
        layers=base.layers,
        experts=base.experts,
        length=base.length,
        seed=seed,
    )
