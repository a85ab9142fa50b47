"""Mistral (Jiang et al. 2023): a Llama whose positions see a window of those before them, in its first version."""

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

from lmx.kernels.masks import Causal, Mask, SlidingWindow
from lmx.models.config_map import ConfigMap, Reader, decoder_tasks
from lmx.models.families.llama import CONFIG, NAMES, Llama
from lmx.models.names import NameMap
from lmx.nn.attention import SelfAttention
from lmx.nn.position import Rope


@dataclass(frozen=True)
class Mistral(Llama):
    """The sizes of a Mistral; the defaults are 7B 0.1."""

    vocab: int = 32000
    context: int = 32768
    rope: Rope = Rope(10_000.0)
    window: int | None = 4096
    """Positions that a position sees, itself included; None for all before it."""

    family: ClassVar[str] = "mistral"
    names: ClassVar[NameMap] = dataclasses.replace(NAMES, bases={"embedding": ""})
    config_map: ClassVar[ConfigMap] = dataclasses.replace(
        CONFIG, only={"hidden_act": "silu"}, architectures=decoder_tasks("Mistral")
    )

    def mask(self, layer: int) -> Mask:
        """What the positions see in a layer, counted from 0."""
        return Causal() if self.window is None else SlidingWindow(self.window)

    def attention(self, layer: int, **more: Any) -> SelfAttention:
        """With that mask."""
        return super().attention(layer, mask=self.mask(layer), **more)

    @classmethod
    def read_more(cls, config: Reader) -> dict[str, Any]:
        """And the window: null is none, but a file without the key means transformers' default."""
        return super().read_more(config) | {"window": config.get("sliding_window", 4096)}

    def write_more(self) -> dict[str, Any]:
        """The entries for those."""
        return super().write_more() | {"sliding_window": self.window}


SMALL = Mistral(vocab=131072, layers=40, width=5120, hidden=32768, rope=Rope(1e8), window=None)
PRESETS = {
    "mistral_7b": Mistral(),
    "mistral_7b_v0_3": Mistral(vocab=32768, rope=Rope(1e6), window=None),
    "mistral_nemo_12b": dataclasses.replace(SMALL, context=131072, hidden=14336, rope=Rope(1e6)),
    "mistral_small_24b": SMALL,
}
"""Published sizes."""
