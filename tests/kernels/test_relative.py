import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmx.errors import UserError
from lmx.kernels.relative import RelativeBuckets

DISTANCES = [-5000, -128, -127, -64, -33, -32, -31, -16, -12, -9, -8, -7, -1, 0, 1, 7, 8, 9, 12, 16, 31, 32, 64, 5000]


@pytest.mark.parametrize(
    ("bias", "expected"),
    [  # as transformers' T5Attention._relative_position_bucket gives them
        (
            RelativeBuckets(),
            [15, 15, 15, 14, 12, 12, 11, 10, 9, 8, 8, 7, 1, 0, 17, 23, 24, 24, 25, 26, 27, 28, 30, 31],
        ),
        (
            RelativeBuckets(bidirectional=False),
            [31, 31, 31, 26, 21, 21, 21, 16, 12, 9, 8, 7, 1] + [0] * 11,
        ),
        (
            RelativeBuckets(20, 64),
            [9, 9, 9, 9, 8, 8, 8, 7, 6, 6, 5, 5, 1, 0, 11, 15, 15, 16, 16, 17, 18, 18, 19, 19],
        ),
    ],
    ids=repr,
)
def test_buckets_are_those_of_t5(bias, expected):
    assert jax.jit(bias.bucket)(jnp.array(DISTANCES)).tolist() == expected


def test_scores_are_the_rows_of_the_table():
    bias = RelativeBuckets(8, 20)
    table = np.arange(8 * 3).astype(jnp.bfloat16).reshape(8, 3)
    queries, keys = np.array([[0, 5], [100, 3]], np.int32), np.array([[0, 1, 30], [4, 5, 6]], np.int32)
    scores = np.asarray(jax.jit(bias.scores)(table, queries, keys))
    buckets = np.asarray(jax.jit(bias.bucket)(keys[:, None] - queries[:, :, None]))
    assert scores.dtype == jnp.float32
    assert scores.shape == (2, 3, 2, 3)
    for b, h, q, k in np.ndindex(*scores.shape):
        assert scores[b, h, q, k] == table[buckets[b, q, k], h]


@pytest.mark.parametrize("numbers", [(2, 128, True), (1, 128, False), (32, 8, True)])
def test_buckets_that_do_not_fit_are_refused(numbers):
    with pytest.raises(UserError, match=f"{numbers[0]} relative buckets and max_distance {numbers[1]}"):
        RelativeBuckets(*numbers)
