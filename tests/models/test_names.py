import pytest

from lmx.errors import UserError
from lmx.models.names import conv1d, linear, only, required, table, vector


@pytest.mark.parametrize(
    ("stored", "shape", "joined"),
    [
        (vector("x"), (4, 8), (32,)),
        (table("x"), (50, 32), (50, 32)),
        (linear("x"), (32, 4, 8), (32, 32)),
        (conv1d("x", inputs=2), (4, 8, 16), (32, 16)),
    ],
)
def test_axes_are_joined_at_the_split(stored, shape, joined):
    assert stored.joined(shape) == joined


def test_options_that_a_family_does_not_compute():
    config = {"model_type": "gpt2", "n_embd": 8, "activation_function": "relu"}
    assert required(config, "n_embd") == 8
    only(config, n_embd=8, absent=True)
    with pytest.raises(UserError, match="sets activation_function to 'relu'; gpt2 is supported with 'gelu_new' only"):
        only(config, activation_function="gelu_new")
    with pytest.raises(UserError, match="lacks 'n_head', which a gpt2 needs"):
        required(config, "n_head")
