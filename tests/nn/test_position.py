import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmx.config import from_data, to_data
from lmx.errors import UserError
from lmx.nn.position import LinearScaling, Llama3Scaling, LongRope, Rope, YarnScaling

POSITIONS = jnp.array([[0, 1, 2, 70], [5, 6, 0, 3]], jnp.int32)
LONG = LongRope((1.0, 2.0, 1.5, 1.1), (4.0, 5.0, 6.0, 7.0), original_context=8, factor=3.0)
PLAIN = [10000 ** (-i / 4) for i in range(4)]
# Frequencies and amplitudes that transformers 5.23 computes for these numbers.
SCALED = {
    "plain": (Rope(), PLAIN, 1.0),
    "linear": (Rope(scaling=LinearScaling(4.0)), [f / 4 for f in PLAIN], 1.0),
    "llama3": (
        Rope(500_000.0, scaling=Llama3Scaling(8.0, 1.0, 4.0, 8192)),
        [1.0, 0.19392276, 0.037606031, 0.0072926651, 0.00052484602, 3.4281024e-05, 6.6478697e-06, 1.2891732e-06],
        1.0,
    ),
    "gpt-oss": (
        Rope(150_000.0, scaling=YarnScaling(32.0, 4096, truncate=False)),
        [1.0, 0.225418, 0.050813273, 0.0067949593, 0.00045648392, 1.8188337e-05, 4.0999785e-06, 9.2420896e-07],
        1.3465735902799727,
    ),
    "deepseek": (
        Rope(scaling=YarnScaling(40.0, 16, beta_fast=4.0, mscale=0.707, mscale_all_dim=0.5)),
        [1.0, 0.0079056947, 0.0025, 0.00079056947, 0.00025, 7.9056947e-05, 2.5e-05, 7.9056945e-06],
        1.064468903941252,
    ),
    "longrope": (Rope(20_000.0, scaling=LONG), [1.0, 0.042044822, 0.0047140452, 0.00054054864], 1.2362527385505437),
}
REACHED = [0.25, 0.016817929, 0.0011785113, 8.4943364e-05]  # the long factors' frequencies


def drawn(head_dim: int, dtype=jnp.float32) -> jax.Array:
    return jax.random.normal(jax.random.key(head_dim), (*POSITIONS.shape, 3, head_dim)).astype(dtype)


def turned(x, angles, amplitude):
    """Each pair (i, i + half) as a complex number, times amplitude * exp(i angle), in float64."""
    first, second = np.split(np.asarray(x, np.float64), 2, axis=-1)
    pairs = (first + 1j * second) * amplitude * np.exp(1j * np.asarray(angles))[..., None, :]
    return np.concatenate([pairs.real, pairs.imag], axis=-1)


def rotated(rope, x, positions, reach=None):
    """As one program, and NumPy: every eager operation is compiled."""
    return np.asarray(jax.jit(lambda x, at: rope.rotate(x, at, reach))(x, positions))


@pytest.mark.parametrize("name", SCALED)
def test_pairs_turn_by_the_frequencies_of_transformers(name):
    rope, frequencies, amplitude = SCALED[name]
    x = drawn(2 * len(frequencies))
    expected = turned(x, POSITIONS[..., None] * np.array(frequencies), amplitude)
    np.testing.assert_allclose(rotated(rope, x, POSITIONS, 8), expected, atol=3e-5)


@pytest.mark.parametrize(
    ("reach", "far"),
    [(None, [True, False]), (8, [False, False]), (9, [True, True]), (jnp.array([8, 9]), [False, True])],
    ids=["as it comes", "within", "beyond", "by row"],
)
def test_longrope_takes_the_long_factors_in_rows_beyond_the_original_context(reach, far):
    x, (rope, short, amplitude) = drawn(8), SCALED["longrope"]
    frequencies = np.where(np.array(far)[:, None, None], REACHED, short)
    expected = turned(x, POSITIONS[..., None] * frequencies, amplitude)
    np.testing.assert_allclose(rotated(rope, x, POSITIONS, reach), expected, atol=3e-5)


def test_yarn_with_equal_mscales_has_no_amplitude_but_a_softmax_factor():
    scaling = YarnScaling(40.0, 4096, mscale=1.0, mscale_all_dim=1.0)
    assert scaling.amplitude == 1
    assert scaling.softmax_factor == pytest.approx((0.1 * np.log(40) + 1) ** 2)
    assert YarnScaling(40.0, 4096).softmax_factor == 1
    assert YarnScaling(40.0, 4096, attention_factor=1.5).amplitude == 1.5


def test_interleaved_pairs_are_halves_in_another_order():
    x = drawn(8)
    order = np.arange(8).reshape(4, 2).T.reshape(-1)  # 0 2 4 6 1 3 5 7
    got = rotated(Rope(pairing="interleaved"), x, POSITIONS)
    np.testing.assert_array_equal(got[..., order], rotated(Rope(), x[..., order], POSITIONS))


@pytest.mark.parametrize("pairing", ["halves", "interleaved"])
def test_partial_rotation_leaves_the_other_dims(pairing):
    x = drawn(10)
    got = rotated(Rope(dims=4, pairing=pairing), x, POSITIONS)
    np.testing.assert_array_equal(got[..., 4:], x[..., 4:])
    np.testing.assert_array_equal(got[..., :4], rotated(Rope(pairing=pairing), x[..., :4], POSITIONS))


@pytest.mark.parametrize("pairing", ["halves", "interleaved"])
def test_products_depend_on_the_distance_alone(pairing):
    rope, x = Rope(pairing=pairing, dims=6), drawn(8)
    near, far = (rotated(rope, x, POSITIONS + shift) for shift in (0, 100))
    products = lambda a: np.einsum("bqhd,bkhd->bhqk", a, a)  # noqa: E731
    np.testing.assert_allclose(products(near), products(far), atol=1e-4)
    assert np.abs(products(near) - products(x)).max() > 0.1


def test_bfloat16_is_rotated_in_float32():
    x, at = drawn(8, jnp.bfloat16), POSITIONS + 1000
    got = rotated(Rope(), x, at)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_array_equal(got, rotated(Rope(), x.astype(jnp.float32), at).astype(jnp.bfloat16))


@pytest.mark.parametrize("name", SCALED)
def test_goes_to_a_file_and_back(name):
    rope = SCALED[name][0]
    assert from_data(Rope, to_data(rope)) == rope


def test_numbers_that_do_not_fit_are_refused():
    with pytest.raises(UserError, match="rotary dims is 3"):
        Rope(dims=3)
    with pytest.raises(UserError, match="12 dims cannot rotate in a head of 8"):
        Rope(dims=12).rotate(drawn(8), POSITIONS)
    with pytest.raises(UserError, match="7 dims cannot rotate"):
        Rope().rotate(drawn(7), POSITIONS)
    with pytest.raises(UserError, match="LongRope has 4 factors, but 6 dims rotate: give 3"):
        Rope(scaling=LONG).rotate(drawn(6), POSITIONS)
