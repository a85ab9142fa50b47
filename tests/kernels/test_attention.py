import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmx.kernels import attention as kernel
from lmx.kernels.masks import Bidirectional, BidirectionalWindow, Causal, Chunked, Mask, SlidingWindow
from lmx.kernels.relative import RelativeBuckets

BATCH, LENGTH, HEAD_DIM = 2, 10, 6
BUCKETS = RelativeBuckets(buckets=8, max_distance=20)
BUCKET_OF = jax.jit(BUCKETS.bucket)
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
        case BidirectionalWindow(radius=radius):
            return -radius <= query - key <= radius
        case Chunked(chunk=chunk):
            return query // chunk * chunk <= key <= query
    raise AssertionError(mask)


def reference(query, key, value, mask, segments=PACKED, scale=None, softcap=None, sinks=None, bias_table=None):
    """Softmax attention in float64, one query and head at a time."""
    query, key, value = (np.asarray(a, np.float64) for a in (query, key, value))
    positions, group = positions_of(segments), query.shape[2] // key.shape[2]
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    buckets = np.asarray(BUCKET_OF(positions[:, None, :] - positions[:, :, None]))
    out = np.zeros((*query.shape[:3], value.shape[3]))
    for b, q, h in np.ndindex(*query.shape[:3]):
        seen = [
            k
            for k in range(key.shape[1])
            if segments[b, q] == segments[b, k] > 0 and sees(mask, positions[b, q], positions[b, k])
        ]
        if seen:
            scores = scale * (key[b, seen, h // group] @ query[b, q, h])
            if bias_table is not None:
                scores = scores + np.asarray(bias_table, np.float64)[buckets[b, q, seen], h]
            if softcap is not None:
                scores = softcap * np.tanh(scores / softcap)
            extra = [] if sinks is None else [np.float64(sinks[h])]
            weights = np.exp(np.append(scores, extra) - scores.max())
            out[b, q, h] = (weights / weights.sum())[: len(seen)] @ value[b, seen, h // group]
    return out


def drawn(heads: int, kv_heads: int, dtype=jnp.float32, length=LENGTH, value_dim=HEAD_DIM) -> tuple[jax.Array, ...]:
    keys = jax.random.split(jax.random.key(heads * 10 + kv_heads), 3)
    shapes = [(BATCH, length, n, d) for n, d in ((heads, HEAD_DIM), (kv_heads, HEAD_DIM), (kv_heads, value_dim))]
    return tuple(jax.random.normal(k, s).astype(dtype) for k, s in zip(keys, shapes, strict=True))


def learned(names: tuple[str, ...], heads: int = 4) -> dict[str, jax.Array]:
    """The parameters of these options that have some."""
    shapes = {"sinks": (heads,), "bias_table": (BUCKETS.buckets, heads)}
    return {n: jax.random.normal(jax.random.key(len(n)), shapes[n]) for n in names if n in shapes}


def chosen(names: tuple[str, ...]) -> dict[str, float]:
    """The numbers of these options that are not learned."""
    return {"softcap": 0.7} if "softcap" in names else {}


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
        options |= {"bias": BUCKETS} if "bias_table" in options else {}
        keys, values = (lambda x: x.transpose(0, 2, 3, 1)), (lambda x: x.swapaxes(1, 2))
        return jax.jit(lambda q, k, v: kernel.attention(q, keys(k), values(v), **options))(query, key, value)

    return run


ALL_MASKS = [
    *[Causal(), Bidirectional(), SlidingWindow(3), SlidingWindow(1), BidirectionalWindow(1), BidirectionalWindow(4)],
    *[Chunked(2), Chunked(3)],
]
OPTIONS = [("softcap",), ("sinks",), ("bias_table",), ("softcap", "sinks", "bias_table")]


CASES = [*((mask, 2) for mask in ALL_MASKS), (Causal(), 4), (Causal(), 1)]


@pytest.mark.parametrize(("mask", "kv_heads"), CASES, ids=repr)
def test_equals_float64_reference(attend, mask, kv_heads):
    arrays = drawn(4, kv_heads)
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


def assert_slopes(gradients, function, arrays):
    """The gradients against central differences of a float64 function, along random directions of all arrays."""
    rng = np.random.default_rng(0)
    for _ in range(4):
        directions = [rng.normal(size=a.shape) for a in arrays]
        ends = [[np.float64(a) + s * d for a, d in zip(arrays, directions, strict=True)] for s in (1e-5, -1e-5)]
        up, down = (function(*end) for end in ends)
        slope = sum(float((g * d).sum()) for g, d in zip(gradients, directions, strict=True))
        assert slope == pytest.approx((up - down) / 2e-5, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("mask", [Causal(), Bidirectional(), SlidingWindow(3), BidirectionalWindow(2)], ids=repr)
def test_gradients_equal_central_differences(attend, mask):
    arrays = drawn(4, 2)
    weights = np.where(REAL[:, :, None, None], np.random.default_rng(0).normal(size=arrays[0].shape), 0)
    gradients = jax.jit(jax.grad(lambda *a: (attend(*a, mask) * weights).sum(), (0, 1, 2)))(*arrays)
    assert_slopes(gradients, lambda *a: (reference(*a, mask) * weights).sum(), arrays)


@pytest.mark.parametrize("names", OPTIONS, ids="+".join)
def test_options_equal_float64_reference(attend, names):
    arrays, options = drawn(4, 2, value_dim=5), learned(names) | chosen(names)
    got = attend(*arrays, Causal(), **options)
    expected = reference(*arrays, Causal(), **options)
    assert np.abs(expected - reference(*arrays, Causal()))[REAL].max() > 0.05  # the options matter
    np.testing.assert_allclose(got[REAL], expected[REAL], atol=2e-6)


@pytest.mark.parametrize("names", OPTIONS, ids="+".join)
def test_gradients_of_options_equal_central_differences(attend, names):
    arrays, own = drawn(4, 2, value_dim=5), learned(names)
    weights = np.where(REAL[:, :, None, None], np.random.default_rng(0).normal(size=(BATCH, LENGTH, 4, 5)), 0)

    def total(attention, *values):
        options = dict(zip(own, values[3:], strict=True)) | chosen(names)
        return (attention(*values[:3], Causal(), **options) * weights).sum()

    values = (*arrays, *own.values())
    gradients = jax.jit(jax.grad(lambda *a: total(attend, *a), range(len(values))))(*values)
    assert_slopes(gradients, lambda *a: total(reference, *a), values)


@pytest.mark.parametrize(
    ("mask", "length"),
    [(Causal(), 200), (SlidingWindow(40), 128), (BidirectionalWindow(30), 200), (Chunked(48), 128)],
    ids=repr,
)
def test_blocks_of_long_rows_equal_dense(monkeypatch, mask, length):
    """All options at once, with documents that end inside blocks, and padding that sees nothing."""
    monkeypatch.setattr(kernel, "BLOCK_MINIMUM", 24)
    assert len(kernel._blocks(mask, length)) == 4
    segments = np.array([[1] * 70 + [2] * (length - 70), [1] * 20 + [2] * 90 + [0] * (length - 110)], np.int32)
    at, within = jnp.asarray(positions_of(segments)), jnp.asarray(segments)
    where = dict.fromkeys(("query_positions", "key_positions"), at)
    where |= dict.fromkeys(("query_segments", "key_segments"), within)
    weights = jnp.where(segments[:, :, None, None] > 0, jax.random.normal(jax.random.key(0), (BATCH, length, 4, 5)), 0)

    def out(itself, query, key, value, sinks, table):
        options = {"sinks": sinks, "bias": BUCKETS, "bias_table": table, "softcap": 2.0, "itself": itself}
        key, value = key.transpose(0, 2, 3, 1), value.swapaxes(1, 2)
        return weights * kernel.attention(query, key, value, mask=mask, **where, **options)

    values = (*drawn(4, 2, length=length, value_dim=5), *learned(("sinks", "bias_table")).values())

    def run(itself):
        result, back = jax.vjp(functools.partial(out, itself), *values)
        return result, back(jnp.ones_like(result))

    (blocked, of_blocked), (dense, of_dense) = (jax.jit(run, static_argnums=0)(itself) for itself in (True, False))
    np.testing.assert_allclose(blocked, dense, atol=1e-6)
    for got, expected in zip(of_blocked, of_dense, strict=True):
        assert np.abs(expected).max() > 0.1
        np.testing.assert_allclose(got, expected, atol=1e-5)


def test_beside_a_sink_a_row_that_sees_nothing_gives_zero_and_takes_no_gradient(attend):
    segments = np.where(PACKED == 3, 0, PACKED)
    values = (*drawn(4, 2), *learned(("sinks", "bias_table")).values())
    options = lambda s, t: {"sinks": s, "bias_table": t, "softcap": 0.7}  # noqa: E731
    of = lambda *a: attend(*a[:3], Causal(), segments, **options(*a[3:]))  # noqa: E731
    assert not np.any(np.asarray(of(*values))[segments == 0])
    empty = jnp.asarray(segments == 0)[:, :, None, None]
    for gradient in jax.grad(lambda *a: jnp.where(empty, of(*a), 0).sum(), range(5))(*values):
        assert not np.any(gradient)


def test_a_sink_takes_what_its_logit_says(attend):
    """One key with the score 0 beside a sink of log 3: a quarter of the value comes through."""
    one = jnp.ones((1, 1, 1, 1))
    got = attend(0 * one, one, 8 * one, Causal(), np.ones((1, 1), np.int32), sinks=jnp.log(jnp.array([3.0])))
    np.testing.assert_allclose(got, 2 * one, rtol=1e-6)


def test_bfloat16_options_are_near_and_gradients_keep_their_dtypes(attend):
    names = ("softcap", "sinks", "bias_table")
    low = (*drawn(4, 2, jnp.bfloat16), *(x.astype(jnp.bfloat16) for x in learned(names).values()))

    def loss(query, key, value, sinks, bias_table):
        options = {"sinks": sinks, "bias_table": bias_table, "softcap": 0.7}
        out = attend(query, key, value, Causal(), **options)
        return jnp.where(REAL[:, :, None, None], out, 0).astype(jnp.float32).sum()

    exact = jax.grad(loss, range(5))(*(x.astype(jnp.float32) for x in low))
    for got, expected in zip(jax.grad(loss, range(5))(*low), exact, strict=True):
        assert got.dtype == jnp.bfloat16
        np.testing.assert_allclose(np.asarray(got, np.float32), expected, atol=0.06)


def test_dropout_drops_its_share_and_keeps_the_mean(attend):
    ones, segments = jnp.ones((1, 256, 1, 1)), np.ones((1, 256), np.int32)
    got = attend(ones, ones, ones, Bidirectional(), segments, dropout=0.25, dropout_key=jax.random.key(0))
    np.testing.assert_allclose(got.mean(), 1, atol=0.01)
    # each output is the mean of 256 values that are 4/3 with probability 3/4
    np.testing.assert_allclose(got.std(), np.sqrt(1 / 3 / 256), rtol=0.2)
