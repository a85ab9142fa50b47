"""PaLM (Chowdhery et al. 2022): parallel sublayers, one key and value head, SwiGLU, no biases.

No checkpoint is public; the names are those of this file alone.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

from lmx.models.config import ModelConfig
from lmx.models.config_map import ConfigMap, decoder_tasks
from lmx.models.names import NameMap, conv1d, table, vector
from lmx.models.specs import BlockSpec, ModelSpec, StackSpec, padded
from lmx.nn.activation import Glu
from lmx.nn.attention import SelfAttention
from lmx.nn.embedding import Embedding
from lmx.nn.mlp import Mlp
from lmx.nn.norm import LayerNorm
from lmx.nn.parallel import Parallel
from lmx.nn.position import Rope

BLOCK = "layers.{layer}."
NAMES = NameMap(
    {
        "embedding/table": table("embedding"),
        "layer/parallel_norm_in/scale": vector(BLOCK + "norm.scale"),
        "layer/parallel/attention/query/kernel": conv1d(BLOCK + "query"),
        "layer/parallel/attention/key/kernel": conv1d(BLOCK + "key"),
        "layer/parallel/attention/value/kernel": conv1d(BLOCK + "value"),
        "layer/parallel/attention/out/kernel": conv1d(BLOCK + "out", inputs=2),
        "layer/parallel/mlp/gate/kernel": conv1d(BLOCK + "gate"),
        "layer/parallel/mlp/up/kernel": conv1d(BLOCK + "up"),
        "layer/parallel/mlp/down/kernel": conv1d(BLOCK + "down"),
        "final_norm/scale": vector("norm.scale"),
        "tasks/classes/out/kernel": conv1d("score"),
        "tasks/classes/out/bias": vector("score_bias"),
        "tasks/span/out/kernel": conv1d("span"),
        "tasks/span/out/bias": vector("span_bias"),
    }
)


@dataclass(frozen=True)
class Palm(ModelConfig):
    """The sizes of a PaLM; the defaults are the 8B model."""

    vocab: int = 256_000
    """Tokens of the vocabulary; at least the tokenizer's."""
    context: int = 2048
    """The longest sequence."""
    layers: int = 32
    """Blocks."""
    width: int = 4096
    """Width of the residual stream."""
    heads: int = 16
    """Query heads; they share one key and one value head."""
    head_dim: int = 256
    """Width of a head."""
    hidden: int = 16_384
    """Hidden units of the feed-forward layer: four times the width in the paper."""
    rope_theta: float = 10_000.0
    """Base of the rotary wavelengths."""
    eps: float = 1e-6
    """Added to the variance in LayerNorm."""

    family: ClassVar[str] = "palm"
    names: ClassVar[NameMap] = NAMES
    config_map: ClassVar[ConfigMap] = ConfigMap(
        own=True,
        keys={
            name: name
            for name in ("vocab", "context", "layers", "width", "heads", "head_dim", "hidden", "rope_theta", "eps")
        },
        architectures=decoder_tasks("Palm"),
    )

    def spec(self) -> ModelSpec:
        """The model's shape. Tables start at 1, kernels at 1 / sqrt(inputs), as in the paper's section 5."""
        norm, fan_in = LayerNorm(eps=self.eps, bias=False), 1 / math.sqrt(self.width)
        attention = SelfAttention(
            heads=self.heads,
            kv_heads=1,
            head_dim=self.head_dim,
            rope=Rope(self.rope_theta),
            std=fan_in,
            out_std=1 / math.sqrt(self.heads * self.head_dim),
        )
        mlp = Mlp(hidden=self.hidden, activation=Glu("silu"), std=fan_in, out_std=1 / math.sqrt(self.hidden))
        block = BlockSpec((Parallel(branches=(attention, mlp), norm_in=norm),))
        return ModelSpec(
            vocab=self.vocab,
            width=self.width,
            context=self.context,
            embedding=Embedding(padded(self.vocab), std=1.0),
            stack=StackSpec.of([block] * self.layers),
            final_norm=norm,
            head=self.head(tied=True, scale=fan_in),
            tasks=self.task_heads(),
        )


PRESETS = {
    "palm_8b": Palm(),
    "palm_62b": Palm(layers=64, width=8192, heads=32, hidden=32_768),
    "palm_540b": Palm(layers=118, width=18_432, heads=48, hidden=73_728),
}
"""The paper's table 1."""
