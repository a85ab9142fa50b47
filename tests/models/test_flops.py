"""FLOPs and parameter counts against published numbers and against counting by hand."""

from dataclasses import replace

import numpy as np
import pytest

from lmx.kernels.masks import Bidirectional, BidirectionalWindow, Causal, Chunked, Mask, SlidingWindow
from lmx.models.config import ModelConfig
from lmx.models.families.bert import Bert
from lmx.models.families.gemma2 import PRESETS as GEMMA2
from lmx.models.families.gpt2 import Gpt2
from lmx.models.families.gpt_oss import GptOss
from lmx.models.families.llama import PRESETS as LLAMA
from lmx.models.families.mixtral import Mixtral
from lmx.models.families.palm import PRESETS as PALM
from lmx.models.families.qwen3_moe import Qwen3Moe
from lmx.models.families.roberta import Roberta
from lmx.models.families.t5 import PRESETS as T5
from lmx.models.families.t5 import T5 as T5Config
from lmx.models.flops import (
    active_parameter_count,
    forward_flops_per_token,
    parameter_count,
    scores,
    seen,
    train_flops_per_token,
    weights,
)
from lmx.models.specs import BlockSpec, ModelSpec, StackSpec
from lmx.nn.activation import Glu
from lmx.nn.attention import SelfAttention
from lmx.nn.embedding import Embedding
from lmx.nn.head import Head
from lmx.nn.latent_attention import LatentAttention
from lmx.nn.mlp import Mlp
from lmx.nn.moe import Moe
from lmx.nn.norm import RmsNorm
from lmx.nn.parallel import Parallel
from lmx.nn.router import SigmoidRouter

MASKS = [Causal(), Bidirectional(), SlidingWindow(5), BidirectionalWindow(radius=3), Chunked(6)]


def deepseek_v3() -> ModelSpec:
    """The published model without its multi-token prediction layer."""
    norm = RmsNorm()
    attention = LatentAttention(norm_in=norm)
    dense = BlockSpec((attention, Mlp(hidden=18432, activation=Glu("silu"), norm_in=norm)))
    router = SigmoidRouter(k=8, groups=8, top_groups=4)
    sparse = BlockSpec((attention, Moe(experts=256, hidden=2048, router=router, shared=2048, norm_in=norm)))
    stack = StackSpec.of([dense] * 3 + [sparse] * 58)
    return ModelSpec(129280, 7168, 163840, Embedding(129280), stack, norm, Head(129280))


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (Gpt2(), 124_439_808),
        (LLAMA["llama_3_8b"], 8_030_261_248),
        (LLAMA["llama_3_70b"], 70_553_706_496),
        (GEMMA2["gemma2_2b"], 2_614_341_888),
        (T5["t5_v1_1_small"], 76_961_152),
        (T5["t5_small"], 60_506_624),
        (T5["t5_v1_1_xxl"], 11_135_332_352),
        (Bert(task="pretraining"), 110_106_428),
        (Roberta(), 124_697_433),
        (Mixtral(), 46_702_792_704),
        (GptOss(), 20_914_757_184),
    ],
)
def test_parameter_counts_are_the_published_ones(config: ModelConfig, expected: int) -> None:
    assert parameter_count(config.spec()) == expected


@pytest.mark.parametrize(
    ("spec", "whole", "active"),
    [
        (Mixtral().spec(), 46.7, 12.9),
        (Qwen3Moe().spec(), 30.5, 3.3),
        (deepseek_v3(), 671.0, 37.6),
        (PALM["palm_540b"].spec(), 540.4, 540.4),
    ],
)
def test_a_token_goes_through_the_chosen_experts_only(spec: ModelSpec, whole: float, active: float) -> None:
    counts = parameter_count(spec), active_parameter_count(spec)
    assert [count / 1e9 for count in counts] == pytest.approx([whole, active], abs=0.06)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("length", [1, 4, 5, 23])
def test_positions_seen_are_those_that_the_mask_allows(mask: Mask, length: int) -> None:
    query = np.arange(length)
    counts = np.asarray(mask.allowed(query[:, None], query[None])).sum(-1)
    assert (seen(mask, length).mean, seen(mask, length).most) == (counts.mean(), counts.max())


def test_long_rows_are_counted_without_a_matrix_of_them() -> None:
    assert seen(Causal(), 1_048_576).mean == 1_048_577 / 2


def test_training_flops_are_palms() -> None:
    """6 N + 12 L H Q T (Chowdhery et al. 2022, appendix B), N the weights of matrix products."""
    config, length = LLAMA["llama_3_8b"], 4096
    kernels = 32 * (4096 * 4096 * 2 + 2 * 4096 * 1024 + 3 * 4096 * 14336) + 128256 * 4096
    expected = 6 * kernels + 12 * 32 * 32 * 128 * length
    assert train_flops_per_token(config.spec(), length) == pytest.approx(expected, rel=1e-12)


def test_forward_flops_take_off_the_causal_half() -> None:
    spec, length = LLAMA["llama_3_8b"].spec(), 4096
    both = 3 * forward_flops_per_token(spec, length), train_flops_per_token(spec, length)
    assert both[1] - both[0] == pytest.approx(12 * 32 * 32 * 128 * (length - (length + 1) / 2))


def test_the_output_table_counts_tied_or_not_and_the_lookup_never() -> None:
    tied, untied = (replace(LLAMA["llama_3_2_1b"], tied=tied).spec() for tied in (True, False))
    assert train_flops_per_token(tied, 64) == train_flops_per_token(untied, 64)
    assert parameter_count(untied) - parameter_count(tied) == 128256 * 2048


def test_padding_rows_cost_nothing() -> None:
    spec = Gpt2().spec()
    table = next(w for w in weights(spec, 8) if w.path == ("embedding", "table"))
    assert table.shape[0] > 50257
    assert (table.parameters, table.flops) == (50257 * 768, 2 * 50257 * 768)


def test_a_window_is_seen_at_most() -> None:
    spec = Gpt2().spec()
    block = BlockSpec((SelfAttention(heads=2, kv_heads=1, head_dim=8, mask=SlidingWindow(16)),))
    (score,) = scores(replace(spec, stack=StackSpec.of([block] * 3)), 64)
    assert score.most_flops == 3 * 2 * 2 * 2 * 8 * 16
    assert score.positions == (16 * 17 / 2 + 48 * 16) / 64


def test_latent_attention_multiplies_wide_keys_and_narrow_values() -> None:
    spec = deepseek_v3()
    each = [score.most_flops / len(score.layers) for score in scores(spec, 128)]
    assert each == [2 * 128 * (192 + 128) * 128] * 2
    assert [score.layers for score in scores(spec, 128)] == [range(3), range(3, 61)]


def test_experts_cost_what_is_chosen_of_them() -> None:
    spec = deepseek_v3()
    by_name = {"/".join(w.path[3:]): w for w in weights(spec, 8) if w.path[1:2] == ("segment_1",)}
    assert by_name["moe/experts/up/kernel"].flops == 2 * 58 * 8 * 7168 * 2048
    assert by_name["moe/shared/up/kernel"].flops == 2 * 58 * 7168 * 2048
    assert by_name["moe/router/kernel"].flops == 2 * 58 * 7168 * 256
    assert by_name["moe/router/correction"].flops == 0


def test_parallel_branches_cost_what_they_cost_alone() -> None:
    spec = Gpt2().spec()
    attention, moe = SelfAttention(heads=2, kv_heads=2, head_dim=8), Moe(experts=8, hidden=16)
    alone = replace(spec, stack=StackSpec.of([BlockSpec((attention, moe))] * 2))
    side = replace(spec, stack=StackSpec.of([BlockSpec((Parallel(branches=(attention, moe)),))] * 2))
    assert forward_flops_per_token(side, 32) == forward_flops_per_token(alone, 32)
    assert active_parameter_count(side) == active_parameter_count(alone) < parameter_count(alone)


def test_an_encoder_decoder_counts_a_token_of_each() -> None:
    config = T5Config(width=16, heads=2, head_dim=8, hidden=32, encoder_layers=2, decoder_layers=3, vocab=128)
    attention, mlp = 4 * 16 * 16, 3 * 16 * 32
    kernels = 2 * (attention + mlp) + 3 * (2 * attention + mlp) + 128 * 16
    length = 10
    positions = 2 * length + 3 * ((length + 1) / 2 + length)
    assert forward_flops_per_token(config.spec(), length) == 2 * kernels + 2 * 2 * 16 * positions


def test_transforms_are_weights_and_a_rows_own_head_is_shared_by_its_tokens() -> None:
    config = Bert(vocab=128, layers=1, width=16, heads=2, hidden=32, task="pretraining")
    flops = {"/".join(w.path): w.flops for w in weights(config.spec(), 8)}
    assert flops["head/transform/dense/kernel"] == 2 * 16 * 16
    assert flops["embedding/table"] == 2 * 128 * 16
    pooler = [f for name, f in flops.items() if name.startswith("tasks/") and "transform/dense/kernel" in name]
    assert pooler == [2 * 16 * 16 / 8]


def test_a_decoders_row_may_be_shorter_than_the_source() -> None:
    sizes: dict[str, int] = {"vocab": 640, "width": 32, "heads": 4, "head_dim": 8, "hidden": 64}
    model = T5Config(encoder_layers=2, decoder_layers=3, feed_forward="relu", **sizes)
    spec, source, target = model.spec(), 24, 10
    attention, mlp = 4 * 32 * 32, 2 * 32 * 64
    encoder = source * 2 * (attention + mlp) + 2 * 2 * 32 * source * source
    own = target * (attention + mlp) + 2 * 32 * target * target
    across = target * attention // 2 + source * attention // 2 + 2 * 32 * target * source
    expected = 6 * (encoder + 3 * (own + across) + 640 * 32 * target)
    assert source * train_flops_per_token(spec, source, target) == pytest.approx(expected, rel=1e-12)
    assert train_flops_per_token(spec, source, source) == train_flops_per_token(spec, source)


def test_only_what_is_predicted_meets_the_table() -> None:
    spec = Bert(vocab=640, context=32, layers=1, width=16, heads=2, hidden=32).spec()
    all_of_them, some = train_flops_per_token(spec, 32), train_flops_per_token(spec, 32, predicted=8)
    assert all_of_them - some == pytest.approx(6 * (640 * 16 + 16 * 16) * 24 / 32)
