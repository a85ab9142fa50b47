"""Gemma 3 (Gemma Team 2025), its language model: Gemma 2 with norms on queries and keys in place of the soft caps, five
local layers to a global one, and another rotary base in each."""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

from lmx.errors import UserError
from lmx.models.config_map import ConfigMap, Reader
from lmx.models.families.gemma2 import CONFIG as GEMMA2
from lmx.models.families.gemma2 import NAMES as GEMMA2_NAMES
from lmx.models.families.gemma2 import Gemma2
from lmx.models.families.llama import BLOCK
from lmx.models.layer_types import LOCAL, is_global, read_period
from lmx.models.names import NameMap, vector
from lmx.models.rope import read_rope
from lmx.nn.attention import SelfAttention
from lmx.nn.position import LinearScaling, Rope

VISION = ("vision_tower.*", "multi_modal_projector.*")
NAMES = replace(
    GEMMA2_NAMES,
    stored={
        **GEMMA2_NAMES.stored,
        "layer/attention/query_norm/scale": vector(BLOCK + "self_attn.q_norm.weight"),
        "layer/attention/key_norm/scale": vector(BLOCK + "self_attn.k_norm.weight"),
    },
    ignored=(*GEMMA2_NAMES.ignored, *VISION, *(f"model.{pattern}" for pattern in VISION)),
    renames=((r"^language_model\.", ""), (r"^model\.language_model\.", "model.")),
)
DEFAULTS = {
    "vocab_size": 262_208,
    "max_position_embeddings": 131_072,
    "num_hidden_layers": 26,
    "hidden_size": 2304,
    "num_attention_heads": 8,
    "intermediate_size": 9216,
}
"""What the text part of a multimodal file may leave out: transformers' numbers."""
WHOLE = {
    "Gemma3ForConditionalGeneration": "Gemma3ForCausalLM",
    "Gemma3ForSequenceClassification": "Gemma3TextForSequenceClassification",
    "Gemma3Model": "Gemma3TextModel",
}
"""Classes of the multimodal model, and of its text part."""
CONFIG = replace(
    GEMMA2,
    architectures={
        "token_prediction": "Gemma3ForCausalLM",
        "sequence_classification": "Gemma3TextForSequenceClassification",
        "embedding": "Gemma3TextModel",
    },
    ignored=(*GEMMA2.ignored, "_sliding_window_pattern"),
)


@dataclass(frozen=True)
class Gemma3Text(Gemma2):
    """The sizes of a Gemma 3; the defaults are the 4B model's."""

    vocab: int = 262_208
    """Tokens of the vocabulary; at least the tokenizer's."""
    context: int = 131_072
    """The longest sequence."""
    layers: int = 34
    """Blocks."""
    width: int = 2560
    """Width of the residual stream."""
    heads: int = 8
    """Query heads."""
    kv_heads: int = 4
    """Key and value heads: as many as query heads (MHA), fewer (GQA) or one (MQA)."""
    hidden: int = 10_240
    """Hidden units of the feed-forward layer."""
    rope: Rope = Rope(1_000_000.0, scaling=LinearScaling(8.0))
    """Rotary positions of the global layers."""
    local_theta: float = 10_000.0
    """Base of the rotary wavelengths of the local layers, which are not scaled."""
    window: int = 1024
    """Positions that a local layer sees, a token's own among them."""
    period: int = 6
    """Each layer whose number, from 1, this divides is global, the others are local; 0: all are local."""
    attention_softcap: float | None = None
    """Bounds the attention scores smoothly."""
    logit_softcap: float | None = None
    """Bounds the logits smoothly."""

    family: ClassVar[str] = "gemma3_text"
    also: ClassVar[tuple[str, ...]] = ("gemma3",)
    names: ClassVar[NameMap] = NAMES
    config_map: ClassVar[ConfigMap] = CONFIG

    def attention(self, layer: int, **more: Any) -> SelfAttention:
        """A layer's attention."""
        rope = self.rope if is_global(layer, self.period) else Rope(self.local_theta)
        return super().attention(layer, **{"rope": rope, "qk_norm": self.norm()} | more)

    @classmethod
    def from_huggingface(cls, config: Mapping[str, Any]) -> Self:
        """Also from the multimodal model's ``config.json``, with a warning that only its text part is taken."""
        return super().from_huggingface(_text_part(config) if "text_config" in config else config)

    @classmethod
    def read_more(cls, config: Reader) -> dict[str, Any]:
        """What differs between local and global layers."""
        more, local = super().read_more(config), config.value("rope_local_base_freq", cls.local_theta)
        if LOCAL in (config.get("rope_parameters") or {}):
            rope = read_rope(config, head_dim=config["head_dim"], layer_type=LOCAL, theta=local)
            if rope != Rope(local := rope.theta):
                raise UserError(
                    f"config.json scales the rotary positions of local layers ({rope}); expected default ones"
                )
        period = read_period(config, config.value("sliding_window_pattern", cls.period))
        return {**more, "local_theta": float(local), "period": period}

    def write_more(self) -> dict[str, Any]:
        """The entries for those."""
        pattern = {"sliding_window_pattern": self.period} if self.period else {}
        return {**super().write_more(), "rope_local_base_freq": self.local_theta, **pattern}


def _text_part(config: Mapping[str, Any]) -> dict[str, Any]:
    """The text part of a multimodal ``config.json``, as one of its own."""
    names = config.get("architectures") or ["Gemma3ForConditionalGeneration"]
    warnings.warn(f"{names[0]} reads images too; only its text part is taken, without the vision tower", stacklevel=3)
    outer = {key: config[key] for key in ("tie_word_embeddings", "id2label") if key in config}
    own = {"model_type": Gemma3Text.family, "architectures": [WHOLE.get(names[0], names[0])]}
    return {**DEFAULTS, **config["text_config"], **outer, **own}


PRESETS = {
    "gemma3_1b": Gemma3Text(
        vocab=262_144,
        context=32_768,
        layers=26,
        width=1152,
        heads=4,
        kv_heads=1,
        hidden=6912,
        window=512,
        rope=Rope(1_000_000.0),
    ),
    "gemma3_4b": Gemma3Text(),
    "gemma3_12b": Gemma3Text(layers=48, width=3840, heads=16, kv_heads=8, hidden=15_360),
    "gemma3_27b": Gemma3Text(
        layers=62,
        width=5376,
        heads=32,
        kv_heads=16,
        head_dim=128,
        hidden=21_504,
        query_scalar=168,
    ),
}
"""Those of the Hub."""
