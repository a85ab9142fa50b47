"""The published sizes: each is a model, goes to config.json and back, and has as many parameters as it is known for."""

from dataclasses import replace

import pytest

from lmx.checkpoint.huggingface import read_config
from lmx.models.families import presets
from lmx.models.flops import active_parameter_count, parameter_count

MILLIONS = {
    "bart_large": 406.3,
    "bert_base": 110.1,
    "deepseek_v3": 671_026.4,
    "gemma2_9b": 9_241.7,
    "gemma3_1b": 999.9,
    "gemma_7b": 8_537.7,
    "gpt2_1558m": 1_557.6,
    "gpt_oss_120b": 116_829.2,
    "llama_3_1_405b": 405_853.4,
    "mistral_7b": 7_241.7,
    "mixtral_8x22b": 140_621.0,
    "modernbert_base": 149.7,
    "olmo2_7b": 7_298.6,
    "palm_540b": 540_360.0,
    "phi_3_mini_4k": 3_821.1,
    "qwen2_5_72b": 72_706.2,
    "qwen3_235b_a22b": 235_093.6,
    "roberta_large": 355.4,
    "t5_v1_1_xxl": 11_135.3,
    "transformer_big": 214.2,
}
"""Parameters, with everything that the checkpoints hold."""


@pytest.mark.parametrize("name", sorted(presets()))
def test_a_preset_goes_both_ways(name: str) -> None:
    config = presets()[name]
    if name.startswith("transformer_"):
        config = replace(config, dropout=0.0)  # which is of training, and in no config.json
    assert read_config(config.to_huggingface()) == config
    assert 0 < active_parameter_count(config.spec()) <= parameter_count(config.spec())


@pytest.mark.parametrize("name", sorted(MILLIONS))
def test_parameters_are_as_many_as_known(name: str) -> None:
    assert parameter_count(presets()[name].spec()) / 1e6 == pytest.approx(MILLIONS[name], rel=2e-3)
