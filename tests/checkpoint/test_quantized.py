"""Quantized checkpoints, against the definitions of their formats, one number at a time."""

import ml_dtypes
import numpy as np
import pytest

from lmx.checkpoint.huggingface import InMemory, dequantized
from lmx.errors import UserError

FP8 = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [4, 3]}}
MXFP4 = {"quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}}


def fp8(rng, shape=(10, 8)):
    weight = rng.normal(size=shape).astype(ml_dtypes.float8_e4m3fn)
    scale = rng.uniform(0.5, 2, size=(-(-shape[0] // 4), -(-shape[1] // 3))).astype(np.float32)
    return {"x.weight": weight, "x.weight_scale_inv": scale, "norm.weight": np.ones(8, ml_dtypes.bfloat16)}


def test_fp8_blocks():
    stored = fp8(np.random.default_rng(0))
    tensors = dequantized(InMemory(stored), FP8)
    assert list(tensors) == ["x.weight", "norm.weight"]
    assert "x.weight_scale_inv" not in tensors
    assert (tensors.info("x.weight").shape, tensors.info("x.weight").dtype) == ((10, 8), ml_dtypes.bfloat16)
    got = tensors.read("x.weight")
    for i, j in np.ndindex(10, 8):
        exact = np.float32(stored["x.weight"][i, j]) * stored["x.weight_scale_inv"][i // 4, j // 3]
        assert got[i, j] == exact.astype(ml_dtypes.bfloat16)
    for first, last in ((0, 10), (3, 9), (4, 8), (9, 10), (5, 5)):
        part = tensors.read("x.weight", slice(first, last))
        assert part.tobytes() == got[first:last].tobytes()
    assert tensors.read("norm.weight") is not None
    assert tensors.info("norm.weight").shape == (8,)


def test_fp8_with_powers_of_two_as_factors():
    stored = fp8(np.random.default_rng(0)) | {"x.weight_scale_inv": np.full((3, 3), 0.25, ml_dtypes.float8_e8m0fnu)}
    got = dequantized(InMemory(stored), FP8).read("x.weight")
    assert np.array_equal(got.astype(np.float32), stored["x.weight"].astype(np.float32) / 4)


# Positive and negative: zero, the one subnormal, and 2^e * (1 or 1.5) for e of 0, 1, 2.
E2M1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6]


def test_mxfp4():
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 256, (2, 5, 3, 16), np.uint8)
    scales = rng.integers(117, 137, (2, 5, 3), np.uint8)
    scales[0, 0, 0], scales[0, 0, 1] = 0, 250
    tensors = dequantized(InMemory({"a_blocks": blocks, "a_scales": scales, "b_scales": np.ones(2)}), MXFP4)
    assert list(tensors) == ["a", "b_scales"]
    assert "a" in tensors
    assert "c" not in tensors
    assert (tensors.info("a").shape, tensors.info("a").dtype) == ((2, 96, 5), ml_dtypes.bfloat16)
    got = tensors.read("a").astype(np.float64)
    for expert, out, i in np.ndindex(2, 5, 96):
        byte = int(blocks[expert, out, i // 32, i % 32 // 2])
        code = byte >> 4 if i % 2 else byte & 15
        exact = E2M1[code & 7] * (-1) ** (code >> 3) * 2.0 ** (int(scales[expert, out, i // 32]) - 127)
        assert got[expert, i, out] == exact
    assert tensors.read("a", slice(1, 2)).tobytes() == tensors.read("a")[1:].tobytes()


def test_without_quantization_nothing_changes():
    tensors = InMemory({"x": np.ones(2)})
    assert dequantized(tensors, {"quantization_config": None}) is tensors


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"quant_method": "gptq", "bits": 4}, "quantized with 'gptq'"),
        ({"quant_method": "fp8"}, r"quantized with 'fp8' \(weight_block_size None\)"),
        ({"load_in_4bit": True}, "quantized with None"),
    ],
)
def test_other_ways_are_refused(how, words):
    with pytest.raises(UserError, match=f"{words}.*only blocks of 'fp8' and 'mxfp4' are read"):
        dequantized(InMemory(), {"quantization_config": how})


def test_factors_that_do_not_fit():
    stored = fp8(np.random.default_rng(0)) | {"x.weight_scale_inv": np.ones((3, 2), np.float32)}
    with pytest.raises(UserError, match=r"x.weight_scale_inv has the shape \(3, 2\), expected \(3, 3\)"):
        dequantized(InMemory(stored), FP8).info("x.weight")
    blocks = np.zeros((2, 5, 3, 16), np.uint8)
    with pytest.raises(UserError, match="has a_blocks but lacks a_scales"):
        dequantized(InMemory({"a_blocks": blocks}), MXFP4).info("a")
    with pytest.raises(UserError, match=r"a_scales has the shape \(2, 5\), expected \(2, 5, 3\)"):
        dequantized(InMemory({"a_blocks": blocks, "a_scales": np.zeros((2, 5), np.uint8)}), MXFP4).info("a")
