import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmx.kernels import attention as kernel
from lmx.kernels.masks import Bidirectional, Causal, Mask, SlidingWindow

BATCH, LENGTH, HEAD_DIM = 2, 10, 6
PACKED = np.array([[1] * 4 + [2] * 3 + [3] * 3, [1] * 6 + [2] * 2 + [0] * 2], np.int32)
REAL = PACKED > 0


def positions_of(segments: np.ndarray) -> np.ndarray:
    """Each document counts from 0."""
    positions = np.zeros_like(segments)
    for row, ids in enumerate(segments):
        for i in range(1, len(ids)):
            positions[row, i] = positions[row, i - 1] + 1 if ids[i] == ids[i - 1] else 0
    return positions


def sees(mask: Mask, query: int, key: int) -> bool:
    """The masks in words of their own."""
    match mask:
        case Bidirectional():
            return True
        case Causal():
            return key <= query
        case SlidingWindow(window=window):
            return 0 <= query - key < window
    raise AssertionError(mask)


def reference(query, key, value, mask, segments=PACKED, scale=None):
    """Softmax attention in float64, one query and head at a time."""
    query, key, value = (np.asarray(a, np.float64) for a in (query, key, value))
    positions, group = positions_of(segments), query.shape[2] // key.shape[2]
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    out = np.zeros_like(query)
    for b, q, h in np.ndindex(*query.shape[:3]):
        seen = [
            k
            for k in range(key.shape[1])
            if segments[b, q] == segments[b, k] > 0 and sees(mask, positions[b, q], positions[b, k])
        ]
        if seen:
            scores = scale * (key[b, seen, h // group] @ query[b, q, h])
            weights = np.exp(scores - scores.max())
            out[b, q, h] = weights / weights.sum() @ value[b, seen, h // group]
    return out


def drawn(heads: int, kv_heads: int, dtype=jnp.float32) -> tuple[jax.Array, ...]:
    keys = jax.random.split(jax.random.key(heads * 10 + kv_heads), 3)
    shapes = [(BATCH, LENGTH, n, HEAD_DIM) for n in (heads, kv_heads, kv_heads)]
    return tuple(jax.random.normal(k, s).astype(dtype) for k, s in zip(keys, shapes, strict=True))


@pytest.fixture(params=["dense", "one block", "blocks"])
def attend(request, monkeypatch):
    """Attention of packed rows to themselves, by each implementation."""
    monkeypatch.setattr(kernel, "BLOCK_MINIMUM", 3 if request.param == "blocks" else 128)

    def run(query, key, value, mask, segments=PACKED, **options):
        at, within = jnp.asarray(positions_of(segments)), jnp.asarray(segments)
        options |= {
            "query_positions": at,
            "key_positions": at,
            "query_segments": within,
            "key_segments": within,
        }
        options |= {"mask": mask, "itself": request.param != "dense"}
        keys, values = (lambda x: x.transpose(0, 2, 3, 1)), (lambda x: x.swapaxes(1, 2))
        return jax.jit(lambda q, k, v: kernel.attention(q, keys(k), values(v), **options))(query, key, value)

    return run


@pytest.mark.parametrize("mask", [Causal(), Bidirectional(), SlidingWindow(3), SlidingWindow(1)], ids=repr)
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (4, 1)], ids=["mha", "gqa", "mqa"])
def test_equals_float64_reference(attend, mask, heads, kv_heads):
    arrays = drawn(heads, kv_heads)
    got = attend(*arrays, mask)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got[REAL], reference(*arrays, mask)[REAL], atol=2e-6)
    assert np.isfinite(got).all()  # padding sees nothing, and still gives no NaN


def test_scale_replaces_the_default(attend):
    arrays = drawn(4, 2)
    got = attend(*arrays, Causal(), scale=0.9)
    np.testing.assert_allclose(got[REAL], reference(*arrays, Causal(), scale=0.9)[REAL], atol=2e-6)


def test_bfloat16_is_near(attend):
    arrays = drawn(4, 2, jnp.bfloat16)
    got = attend(*arrays, Causal())
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(got, np.float32)[REAL], reference(*arrays, Causal())[REAL], atol=0.03)


def test_bfloat16_gradients_are_near(attend):
    arrays = drawn(4, 2)
    loss = lambda *a: jnp.where(REAL[:, :, None, None], attend(*a, Causal()), 0).astype(jnp.float32).sum()  # noqa: E731
    exact = jax.grad(loss, (0, 1, 2))(*arrays)
    for low, high in zip(jax.grad(loss, (0, 1, 2))(*drawn(4, 2, jnp.bfloat16)), exact, strict=True):
        assert low.dtype == jnp.bfloat16
        np.testing.assert_allclose(np.asarray(low, np.float32), high, atol=0.05)


def test_padding_keys_are_never_seen(attend):
    query, key, value = drawn(4, 2)
    padding = jnp.asarray(~REAL)[:, :, None, None]
    louder = attend(query, jnp.where(padding, 50.0, key), jnp.where(padding, 1e6, value), Bidirectional())
    np.testing.assert_array_equal(louder[REAL], attend(query, key, value, Bidirectional())[REAL])


def test_gradients_stay_within_the_document(attend):
    query, key, value = drawn(4, 2)
    first = jnp.asarray(PACKED == 1)[:, :, None, None]
    of_first = lambda k, v: jnp.where(first, attend(query, k, v, Causal()), 0).sum()  # noqa: E731
    for gradient in jax.jit(jax.grad(of_first, (0, 1)))(key, value):
        assert np.isfinite(gradient).all()
        assert np.abs(gradient[PACKED == 1]).max() > 0
        assert np.abs(gradient[PACKED != 1]).max() == 0


@pytest.mark.parametrize("mask", [Causal(), Bidirectional(), SlidingWindow(3)], ids=repr)
def test_gradients_equal_central_differences(attend, mask):
    """Along random directions in queries, keys and values at once."""
    arrays, rng = drawn(4, 2), np.random.default_rng(0)
    weights = np.where(REAL[:, :, None, None], rng.normal(size=arrays[0].shape), 0)
    gradients = jax.jit(jax.grad(lambda *a: (attend(*a, mask) * weights).sum(), (0, 1, 2)))(*arrays)
    for _ in range(4):
        directions = [rng.normal(size=a.shape) for a in arrays]
        ends = [[np.float64(a) + s * d for a, d in zip(arrays, directions, strict=True)] for s in (1e-5, -1e-5)]
        up, down = ((reference(*end, mask) * weights).sum() for end in ends)
        slope = sum(float((g * d).sum()) for g, d in zip(gradients, directions, strict=True))
        assert slope == pytest.approx((up - down) / 2e-5, rel=1e-4, abs=1e-4)


def test_dropout_drops_its_share_and_keeps_the_mean(attend):
    ones, segments = jnp.ones((1, 256, 1, 1)), np.ones((1, 256), np.int32)
    got = attend(ones, ones, ones, Bidirectional(), segments, dropout=0.25, dropout_key=jax.random.key(0))
    np.testing.assert_allclose(got.mean(), 1, atol=0.01)
    # each output is the mean of 256 values that are 4/3 with probability 3/4
    np.testing.assert_allclose(got.std(), np.sqrt(1 / 3 / 256), rtol=0.2)
