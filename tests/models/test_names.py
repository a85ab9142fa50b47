import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmx.models.names import NameMap, conv1d, linear, row, stacked, table, vector


@pytest.mark.parametrize(
    ("stored", "shapes", "expected"),
    [
        (vector("x"), [(4, 8)], (32,)),
        (vector("x"), [(4, 8), (2, 8)], (48,)),
        (row("x"), [(50,)], (1, 50)),
        (table("x"), [(50, 32)], (50, 32)),
        (linear("x"), [(16, 4, 8)], (32, 16)),
        (linear("x"), [(16, 4, 8), (16, 2, 8), (16, 2, 8)], (64, 16)),
        (linear("x"), [(16,)], (1, 16)),
        (conv1d("x", inputs=2), [(4, 8, 16)], (32, 16)),
        (stacked(vector("x")), [(3, 5)], (3, 5)),
        (stacked(linear("x")), [(3, 16, 5)], (3, 5, 16)),
        (stacked(conv1d("x", outer=1)), [(3, 16, 5), (3, 16, 5)], (3, 16, 10)),
    ],
)
def test_shapes(stored, shapes, expected):
    assert stored.shape(shapes) == expected


def test_experts_gate_and_up_alternate_as_in_gpt_oss():
    tensor = np.arange(2 * 3 * 8).reshape(2, 3, 8)
    stored, shapes = stacked(conv1d("x", outer=1)), [(2, 3, 4), (2, 3, 4)]
    assert np.array_equal(stored.cut(tensor, shapes, 0), tensor[..., ::2])
    assert np.array_equal(stored.cut(tensor, shapes, 1), tensor[..., 1::2])
    bias = np.arange(16).reshape(2, 8)
    assert np.array_equal(stacked(vector("x", outer=1)).cut(bias, [(2, 4), (2, 4)], 1), bias[:, 1::2])


def test_each_head_has_keys_then_values_as_in_deepseek():
    tensor = np.arange(3 * (2 + 4) * 5).reshape(18, 5)
    key, value = (linear("x", outer=1).cut(tensor, [(5, 3, 2), (5, 3, 4)], i) for i in range(2))
    by_head = tensor.T.reshape(5, 3, 6)
    assert np.array_equal(key, by_head[..., :2])
    assert np.array_equal(value, by_head[..., 2:])


VECTORS = vector("x"), vector("x", outer=1), row("x"), stacked(vector("x"))
MATRICES = table("x"), linear("x"), linear("x", outer=1), linear("x", inputs=2), linear("x", outer=2)
MORE = conv1d("x"), conv1d("x", outer=1), conv1d("x", inputs=2)
STACKED = stacked(linear("x")), stacked(linear("x", inputs=2)), stacked(conv1d("x", outer=1)), stacked(table("x"))
KINDS = st.sampled_from([*VECTORS, *MATRICES, *MORE, *STACKED])


@given(KINDS, st.data())
def test_a_part_is_read_from_no_more_rows_than_it_needs(stored, data):
    """Whatever lies beside it: join, then read any box of any of them."""
    size = st.integers(1, 4)
    first = tuple(data.draw(size) for _ in range(3))
    last = [(*first[:-1], data.draw(size)) for _ in range(data.draw(st.integers(0, 2)))]
    # Parameters of one tensor differ along the outputs that lie side by side: the last axis, here.
    shapes = [first, *last] if (stored.split or 0) + stored.outer < 3 else [first] * (1 + len(last))
    arrays = [np.random.default_rng(i).integers(0, 1000, shape) for i, shape in enumerate(shapes)]
    tensor = stored.join(arrays)
    assert tensor.shape == stored.shape(shapes)
    which = data.draw(st.integers(0, len(shapes) - 1))
    box = []
    for n in shapes[which]:
        start = data.draw(st.integers(0, n - 1))
        box.append(slice(start, data.draw(st.integers(start + 1, n))))
    asked = []
    part = stored.read(lambda rows: asked.append(rows) or tensor[rows], shapes, which, box)
    assert np.array_equal(part, arrays[which][tuple(box)])
    assert np.array_equal(stored.cut(tensor, shapes, which), arrays[which])
    assert len(asked) == 1


def test_rows_that_are_read():
    def rows(stored, shapes, which, *box):
        asked = []
        stored.read(lambda rows: asked.append(rows) or np.zeros(stored.shape(shapes))[rows], shapes, which, box)
        return asked[0]

    heads = [(16, 4, 8), (16, 2, 8), (16, 2, 8)]
    every = slice(0, 16), slice(0, 8)
    assert rows(linear("x"), heads, 1, every[0], slice(1, 2), every[1]) == slice(40, 48)  # the second key head
    assert rows(linear("x"), heads, 0, slice(3, 4), slice(0, 4), every[1]) == slice(0, 32)  # all queries, no keys
    assert rows(conv1d("x"), heads, 2, slice(3, 5), slice(0, 2), every[1]) == slice(3, 5)
    assert rows(table("x"), [(50, 16)], 0, slice(10, 20), every[0]) == slice(10, 20)
    assert rows(stacked(linear("x")), [(8, 16, 5)], 0, slice(2, 4), every[0], slice(0, 5)) == slice(2, 4)
    assert rows(linear("x", outer=1), [(16, 4, 2), (16, 4, 3)], 1, every[0], slice(1, 3), slice(0, 3)) == slice(5, 15)


def test_names_that_a_checkpoint_may_use():
    names = NameMap(base="bert.", renames=((r"^language_model\.", ""), (r"LayerNorm\.gamma$", "LayerNorm.weight")))
    assert names.readings("encoder.LayerNorm.gamma") == ("encoder.LayerNorm.weight", "bert.encoder.LayerNorm.weight")
    assert names.readings("language_model.bert.x") == ("bert.x", "bert.bert.x")
    assert vector("a", "b", "c").also == ("b", "c")
