"""GPT-OSS (OpenAI 2025): Llama with experts in every layer, attention sinks, windows in every second layer, biases."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Self

from lmx.kernels.masks import Causal, SlidingWindow
from lmx.models.config_map import ConfigMap, Reader, decoder_tasks
from lmx.models.families.llama import BLOCK, Llama
from lmx.models.families.llama import CONFIG as LLAMA
from lmx.models.families.llama import NAMES as LLAMA_NAMES
from lmx.models.layer_types import is_global, layer_types, read_period
from lmx.models.names import NameMap, conv1d, linear, stacked, vector
from lmx.nn.activation import ClampedGlu
from lmx.nn.attention import SelfAttention
from lmx.nn.moe import Moe
from lmx.nn.position import Rope, YarnScaling
from lmx.nn.router import SoftmaxRouter
from lmx.nn.sublayer import Sublayer

EXPERTS = BLOCK + "mlp.experts."
NAMES = replace(
    LLAMA_NAMES,
    stored={
        **{name: one for name, one in LLAMA_NAMES.stored.items() if not name.startswith("layer/mlp")},
        "layer/attention/query/bias": vector(BLOCK + "self_attn.q_proj.bias"),
        "layer/attention/key/bias": vector(BLOCK + "self_attn.k_proj.bias"),
        "layer/attention/value/bias": vector(BLOCK + "self_attn.v_proj.bias"),
        "layer/attention/out/bias": vector(BLOCK + "self_attn.o_proj.bias"),
        "layer/attention/sinks": vector(BLOCK + "self_attn.sinks"),
        "layer/moe_norm_in/scale": vector(BLOCK + "post_attention_layernorm.weight"),
        "layer/moe/router/kernel": linear(BLOCK + "mlp.router.weight"),
        "layer/moe/router/bias": vector(BLOCK + "mlp.router.bias"),
        "layer/moe/experts/gate/kernel": stacked(conv1d(EXPERTS + "gate_up_proj", outer=1)),
        "layer/moe/experts/up/kernel": stacked(conv1d(EXPERTS + "gate_up_proj", outer=1)),
        "layer/moe/experts/gate/bias": stacked(vector(EXPERTS + "gate_up_proj_bias", outer=1)),
        "layer/moe/experts/up/bias": stacked(vector(EXPERTS + "gate_up_proj_bias", outer=1)),
        "layer/moe/experts/down/kernel": stacked(conv1d(EXPERTS + "down_proj")),
        "layer/moe/experts/down/bias": stacked(vector(EXPERTS + "down_proj_bias")),
    },
)
DEFAULTS = {
    "num_key_value_heads": 8,
    "head_dim": 64,
    "rope_theta": 150_000.0,
}
"""Transformers' numbers, by their key, for what a ``config.json`` may leave out."""
YARN = YarnScaling(factor=32.0, original_context=4096, truncate=False)
"""Transformers' scaling where there is none in the file."""


@dataclass(frozen=True)
class GptOss(Llama):
    """The sizes of a GPT-OSS; the defaults are the 20B model."""

    vocab: int = 201_088
    """Tokens of the vocabulary; at least the tokenizer's."""
    context: int = 131_072
    """The longest sequence."""
    layers: int = 24
    """Blocks."""
    width: int = 2880
    """Width of the residual stream."""
    heads: int = 64
    """Query heads."""
    head_dim: int = 64
    """Width of a head."""
    hidden: int = 2880
    """Hidden units of an expert."""
    rope: Rope = field(default_factory=lambda: Rope(150_000.0, scaling=YARN))
    """Rotary positions: the base of their wavelengths, and how they are scaled beyond the first context."""
    window: int = 128
    """Positions that a local layer sees, a token's own among them."""
    period: int = 2
    """Each layer whose number, from 1, this divides is global, the others are local; 0: all are local."""
    experts: int = 32
    """Experts of a layer."""
    k: int = 4
    """Experts for each token."""
    swiglu: ClampedGlu = field(default_factory=ClampedGlu)
    """The experts' gating, and where it is clamped."""
    balance_loss: float = 0.0
    """Coefficient of the load-balancing loss in training."""

    family: ClassVar[str] = "gpt_oss"
    names: ClassVar[NameMap] = NAMES
    config_map: ClassVar[ConfigMap] = replace(
        LLAMA,
        keys={
            **LLAMA.keys,
            "window": "sliding_window",
            "experts": "num_local_experts",
            "k": "num_experts_per_tok",
        },
        defaults={"tied": False, "eps": 1e-5, "window": 128, "experts": 128, "k": 4},
        only={"hidden_act": "silu", "attention_bias": True},
        architectures=decoder_tasks("GptOss", "question_answering"),
        # The two of the first release say again what other keys say; the rest are of training.
        ignored=("experts_per_token", "initial_context_length", "output_router_logits", "router_aux_loss_coef"),
    )

    def attention(self, layer: int, **more: Any) -> SelfAttention:
        """A layer's attention."""
        mask = Causal() if is_global(layer, self.period) else SlidingWindow(self.window)
        return super().attention(layer, **{"mask": mask, "sinks": True, "bias": True, "out_bias": True} | more)

    def feed_forward(self, layer: int) -> Sublayer:
        """Experts, with biases everywhere."""
        return Moe(
            experts=self.experts,
            hidden=self.hidden,
            router=SoftmaxRouter(k=self.k, bias=True),
            gating=self.swiglu,
            bias=True,
            balance_loss=self.balance_loss,
            norm_in=self.norm(),
        )

    @classmethod
    def from_huggingface(cls, config: Mapping[str, Any]) -> Self:
        """The configuration in a ``config.json``; see :class:`ModelConfig`."""
        return super().from_huggingface({**DEFAULTS, **config})

    @classmethod
    def read_more(cls, config: Reader) -> dict[str, Any]:
        """What alternates, the rotary positions and the gating."""
        more = super().read_more(config)
        if not (config.get("rope_scaling") or config.get("rope_parameters")):
            more["rope"] = replace(more["rope"], scaling=YARN)
        usual = ClampedGlu()
        swiglu = ClampedGlu(config.value("swiglu_alpha", usual.alpha), config.value("swiglu_limit", usual.limit))
        return {**more, "period": read_period(config, 2), "swiglu": swiglu}

    def write_more(self) -> dict[str, Any]:
        """The entries for those; a file without a scaling would have transformers' own."""
        more = super().write_more()
        return {
            **more,
            "rope_scaling": more["rope_scaling"] or {"rope_type": "default"},
            "layer_types": layer_types(self.layers, self.period),
            "swiglu_alpha": self.swiglu.alpha,
            "swiglu_limit": self.swiglu.limit,
        }


PRESETS = {"gpt_oss_20b": GptOss(), "gpt_oss_120b": GptOss(layers=36, experts=128)}
"""Those of the model card's table 1."""
