"""Parts of models: declared once, traced once."""

import functools

from lmx.nn import module
from lmx.nn.activation import Glu
from lmx.nn.mlp import Mlp, MlpModule
from lmx.nn.module import Part


def test_equal_builders_share_one_built_structure() -> None:
    def part(hidden: int) -> Part:
        return Part(functools.partial(MlpModule, Mlp(hidden=hidden, activation=Glu()), 7))

    first = part(11).axes()
    before = module._built.cache_info()
    assert part(11).axes() == first
    part(13).axes()
    after = module._built.cache_info()
    assert (after.hits - before.hits, after.misses - before.misses) == (1, 1)
