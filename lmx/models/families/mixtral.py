"""Mixtral (Jiang et al. 2024): a Mistral whose feed-forward layers are mixtures of experts."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any, ClassVar

from lmx.models.config_map import ConfigMap, Reader, decoder_tasks
from lmx.models.families.llama import BLOCK
from lmx.models.families.mistral import Mistral
from lmx.models.names import NameMap, linear, vector
from lmx.nn.dispatch import Dispatch, Dropless
from lmx.nn.moe import Moe
from lmx.nn.position import Rope
from lmx.nn.router import Router, SoftmaxRouter
from lmx.nn.sublayer import Sublayer

EXPERT = BLOCK + "block_sparse_moe.experts.{expert}."
MOE = {
    "layer/moe_norm_in/scale": vector(BLOCK + "post_attention_layernorm.weight"),
    "layer/moe/router/kernel": linear(BLOCK + "block_sparse_moe.gate.weight"),
    "layer/moe/experts/gate/kernel": linear(EXPERT + "w1.weight"),
    "layer/moe/experts/up/kernel": linear(EXPERT + "w3.weight"),
    "layer/moe/experts/down/kernel": linear(EXPERT + "w2.weight"),
}


@dataclass(frozen=True)
class Mixtral(Mistral):
    """The sizes of a Mixtral; the defaults are 8x7B."""

    rope: Rope = Rope(1e6)
    window: int | None = None
    experts: int = 8
    """Experts of a layer, each with ``hidden`` units."""
    experts_per_token: int = 2
    """Experts that a token goes to."""
    dispatch: Dispatch = field(default_factory=Dropless)
    """How tokens come to their experts: all of them, or within a capacity."""
    balance_loss: float = 0.0
    """Coefficient of the load-balancing loss in training (Mixtral: 0.02)."""
    z_loss: float = 0.0
    """Coefficient of the routers' z-loss in training."""

    family: ClassVar[str] = "mixtral"
    names: ClassVar[NameMap] = dataclasses.replace(Mistral.names, stored={**Mistral.names.stored, **MOE})
    config_map: ClassVar[ConfigMap] = dataclasses.replace(
        Mistral.config_map,
        keys={**Mistral.config_map.keys, "experts": "num_local_experts", "experts_per_token": "num_experts_per_tok"},
        defaults={"tied": False, "eps": 1e-5, "experts": 8, "experts_per_token": 2},
        architectures=decoder_tasks("Mixtral"),
        ignored=("output_router_logits", "router_aux_loss_coef", "router_jitter_noise"),  # of training
    )
    default_theta: ClassVar[float] = 1e6

    def router(self) -> Router:
        """How a token chooses its experts."""
        return SoftmaxRouter(self.experts_per_token)

    def feed_forward(self, layer: int) -> Sublayer:
        """A mixture."""
        return self.mixture(self.hidden)

    def mixture(self, hidden: int) -> Moe:
        """A mixture of experts with that many units."""
        names = ("experts", "dispatch", "balance_loss", "z_loss")
        shared: dict[str, Any] = {name: getattr(self, name) for name in names}
        return Moe(hidden=hidden, router=self.router(), norm_in=self.norm(), **shared)

    @classmethod
    def read_more(cls, config: Reader) -> dict[str, Any]:
        """Without a window where there is no word of one."""
        return super().read_more(config) | {"window": config.get("sliding_window")}


PRESETS = {
    "mixtral_8x7b": Mixtral(),
    "mixtral_8x22b": Mixtral(context=65536, layers=56, width=6144, heads=48, hidden=16384),
}
"""Published sizes."""
