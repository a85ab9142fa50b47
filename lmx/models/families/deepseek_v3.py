"""DeepSeek-V3 (DeepSeek-AI 2024): latent attention, leading dense layers, then routed and shared experts.

Its modules that predict further tokens (section 2.2), and that its checkpoint holds as one more layer, are not read.
"""

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from lmx.models.config import ModelConfig
from lmx.models.config_map import ConfigMap, Reader, decoder_tasks
from lmx.models.families.llama import BLOCK
from lmx.models.families.llama import NAMES as LLAMA
from lmx.models.names import NameMap, linear, vector
from lmx.models.rope import read_rope, write_rope
from lmx.models.specs import BlockSpec, ModelSpec, StackSpec, padded
from lmx.nn.activation import Glu
from lmx.nn.embedding import Embedding
from lmx.nn.latent_attention import LatentAttention
from lmx.nn.mlp import Mlp
from lmx.nn.moe import Moe
from lmx.nn.norm import RmsNorm
from lmx.nn.position import Rope, YarnScaling
from lmx.nn.router import SigmoidRouter
from lmx.nn.sublayer import Sublayer

ATTENTION, EXPERT, SHARED = BLOCK + "self_attn.", BLOCK + "mlp.experts.{expert}.", BLOCK + "mlp.shared_experts."
NAMES = replace(
    LLAMA,
    stored={
        **{name: one for name, one in LLAMA.stored.items() if not name.startswith("layer/attention/")},
        "layer/attention/query/kernel": linear(ATTENTION + "q_proj.weight"),
        "layer/attention/query_down/kernel": linear(ATTENTION + "q_a_proj.weight"),
        "layer/attention/query_norm/scale": vector(ATTENTION + "q_a_layernorm.weight"),
        "layer/attention/query_up/kernel": linear(ATTENTION + "q_b_proj.weight"),
        "layer/attention/latent/kernel": linear(ATTENTION + "kv_a_proj_with_mqa.weight"),
        "layer/attention/rope_key/kernel": linear(ATTENTION + "kv_a_proj_with_mqa.weight"),
        "layer/attention/latent_norm/scale": vector(ATTENTION + "kv_a_layernorm.weight"),
        "layer/attention/latent_up/kernel": linear(ATTENTION + "kv_b_proj.weight"),
        "layer/attention/out/kernel": linear(ATTENTION + "o_proj.weight", inputs=2),
        "layer/moe_norm_in/scale": vector(BLOCK + "post_attention_layernorm.weight"),
        "layer/moe/router/kernel": linear(BLOCK + "mlp.gate.weight"),
        "layer/moe/router/correction": vector(BLOCK + "mlp.gate.e_score_correction_bias"),
        "layer/moe/experts/gate/kernel": linear(EXPERT + "gate_proj.weight"),
        "layer/moe/experts/up/kernel": linear(EXPERT + "up_proj.weight"),
        "layer/moe/experts/down/kernel": linear(EXPERT + "down_proj.weight"),
        "layer/moe/shared/gate/kernel": linear(SHARED + "gate_proj.weight"),
        "layer/moe/shared/up/kernel": linear(SHARED + "up_proj.weight"),
        "layer/moe/shared/down/kernel": linear(SHARED + "down_proj.weight"),
    },
    ignored=(*LLAMA.ignored, "model.layers.61.*"),
)
CONFIG = ConfigMap(
    keys={
        "vocab": "vocab_size",
        "context": "max_position_embeddings",
        "layers": "num_hidden_layers",
        "width": "hidden_size",
        "heads": "num_attention_heads",
        "kv_lora": "kv_lora_rank",
        "nope_dim": "qk_nope_head_dim",
        "rope_dim": "qk_rope_head_dim",
        "value_dim": "v_head_dim",
        "dense_layers": "first_k_dense_replace",
        "hidden": "intermediate_size",
        "experts": "n_routed_experts",
        "shared_experts": "n_shared_experts",
        "expert_hidden": "moe_intermediate_size",
        "tied": "tie_word_embeddings",
        "eps": "rms_norm_eps",
    },
    defaults={"tied": False, "eps": 1e-6},
    only={
        "hidden_act": "silu",
        "attention_bias": False,
        "moe_layer_freq": 1,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
    },
    architectures=decoder_tasks("DeepseekV3", "question_answering"),
    # What follows from other keys, is of training, or of the prediction of further tokens.
    ignored=(
        *("qk_head_dim", "head_dim", "ep_size", "aux_loss_alpha", "seq_aux", "output_router_logits"),
        *("num_nextn_predict_layers", "router_aux_loss_coef"),
    ),
)


@dataclass(frozen=True)
class DeepseekV3(ModelConfig):
    """The sizes of a DeepSeek-V3; the defaults are the 671B model."""

    vocab: int = 129_280
    """Tokens of the vocabulary; at least the tokenizer's."""
    context: int = 163_840
    """The longest sequence."""
    layers: int = 61
    """Blocks."""
    width: int = 7168
    """Width of the residual stream."""
    heads: int = 128
    """Attention heads."""
    q_lora: int | None = 1536
    """Width of the queries' latent; None makes queries straight from the input."""
    kv_lora: int = 512
    """Width of the latent of keys and values."""
    nope_dim: int = 128
    """Dimensions of queries and keys without position."""
    rope_dim: int = 64
    """Dimensions of queries and keys that rotate."""
    value_dim: int = 128
    """Width of a value."""
    dense_layers: int = 3
    """Leading layers that are dense."""
    hidden: int = 18_432
    """Hidden units of a dense layer."""
    experts: int = 256
    """Routed experts of the other layers."""
    shared_experts: int = 1
    """Experts that every token goes through."""
    expert_hidden: int = 2048
    """Hidden units of an expert."""
    router: SigmoidRouter = field(default_factory=lambda: SigmoidRouter(k=8, groups=8, top_groups=4, scale=2.5))
    """How tokens choose experts."""
    rope: Rope = field(
        default_factory=lambda: Rope(
            pairing="interleaved",
            scaling=YarnScaling(factor=40.0, original_context=4096, mscale=1.0, mscale_all_dim=1.0),
        )
    )
    """Rotary positions: the base of their wavelengths, and how they are scaled beyond the first context."""
    tied: bool = False
    """Whether the output table is the embedding table."""
    eps: float = 1e-6
    """Added to the mean square in RMSNorm, but for those of the latents, which have 1e-6."""
    balance_loss: float = 0.0
    """Coefficient of the load-balancing loss in training."""

    family: ClassVar[str] = "deepseek_v3"
    names: ClassVar[NameMap] = NAMES
    config_map: ClassVar[ConfigMap] = CONFIG

    def spec(self) -> ModelSpec:
        """The model's shape. Raises UserError if the router cannot choose among the experts."""
        return ModelSpec(
            vocab=self.vocab,
            width=self.width,
            context=self.context,
            embedding=Embedding(padded(self.vocab)),
            stack=StackSpec.of(BlockSpec((self.attention(), self.feed_forward(n))) for n in range(self.layers)),
            final_norm=RmsNorm(eps=self.eps),
            head=self.head(tied=self.tied),
            tasks=self.task_heads(),
        )

    def attention(self) -> LatentAttention:
        """Every layer's attention; a scaling of the positions changes the scale of its scores too."""
        scaling = self.rope.scaling
        factor = scaling.softmax_factor if isinstance(scaling, YarnScaling) else 1.0
        return LatentAttention(
            heads=self.heads,
            q_lora=self.q_lora,
            kv_lora=self.kv_lora,
            nope_dim=self.nope_dim,
            rope_dim=self.rope_dim,
            value_dim=self.value_dim,
            rope=self.rope,
            scale=factor / (self.nope_dim + self.rope_dim) ** 0.5,
            latent_norm=RmsNorm(eps=1e-6),
            norm_in=RmsNorm(eps=self.eps),
        )

    def feed_forward(self, layer: int) -> Sublayer:
        """A dense layer, or one of experts."""
        norm = RmsNorm(eps=self.eps)
        if layer < self.dense_layers:
            return Mlp(hidden=self.hidden, activation=Glu("silu"), norm_in=norm)
        return Moe(
            experts=self.experts,
            hidden=self.expert_hidden,
            router=self.router,
            shared=self.shared_experts * self.expert_hidden,
            balance_loss=self.balance_loss,
            norm_in=norm,
        )

    @classmethod
    def read_more(cls, config: Reader) -> dict[str, Any]:
        """The router, the rotary positions, and whether queries have a latent."""
        config.only("num_key_value_heads", config.value("num_attention_heads"))
        router = SigmoidRouter(
            k=config.value("num_experts_per_tok"),
            groups=config.value("n_group"),
            top_groups=config.value("topk_group"),
            scale=float(config.value("routed_scaling_factor")),
            renormalise=config.value("norm_topk_prob", True),
        )
        rope = read_rope(config, head_dim=config.value("qk_rope_head_dim"))
        interleaved = config.value("rope_interleave", True)
        return {
            "q_lora": config.get("q_lora_rank", cls.q_lora),
            "router": router,
            "rope": replace(rope, pairing="interleaved" if interleaved else "halves"),
        }

    def write_more(self) -> dict[str, Any]:
        """The entries for those; further tokens are not predicted."""
        return {
            "q_lora_rank": self.q_lora,
            "num_key_value_heads": self.heads,
            "num_experts_per_tok": self.router.k,
            "n_group": self.router.groups,
            "topk_group": self.router.top_groups,
            "routed_scaling_factor": self.router.scale,
            "norm_topk_prob": self.router.renormalise,
            "rope_interleave": self.rope.pairing == "interleaved",
            "num_nextn_predict_layers": 0,
            **write_rope(self.rope, head_dim=self.rope_dim, context=self.context),
        }


PRESETS = {"deepseek_v3": DeepseekV3()}
"""The published size."""
