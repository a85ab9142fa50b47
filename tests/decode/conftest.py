import jax
import numpy as np
import pytest

from lmx.data.tokenizer import TextTokenizer, train_bpe
from lmx.decode.generate import Generator
from lmx.models.families.llama import Llama
from lmx.models.model import Inputs
from lmx.nn.module import Params
from lmx.nn.position import Rope
from tests.jitted import apply, init_params, logits, unstack_layers

TEXT = "the quick brown fox jumps over the lazy dog while three hundred small birds sing in the old garden. "
CONTEXT = 128


@pytest.fixture(scope="session")
def tokenizer() -> TextTokenizer:
    return train_bpe(iter([TEXT * 20]), 320)


@pytest.fixture(scope="session")
def config(tokenizer: TextTokenizer) -> Llama:
    sizes = {"layers": 2, "width": 32, "heads": 4, "kv_heads": 2, "head_dim": 8, "hidden": 64}
    return Llama(vocab=tokenizer.vocab_size, context=CONTEXT, rope=Rope(500.0), **sizes)


@pytest.fixture(scope="session")
def stacked(config: Llama, tokenizer: TextTokenizer) -> Params:
    """Random, lively (far from uniform), and fond of tokens that are ASCII text."""
    made = jax.device_get(init_params(config.spec(), jax.random.key(3)))
    params = jax.tree.map(lambda a: a * np.float32(8) if a.ndim > 2 else a, made)
    plain = np.array([tokenizer.decode([i]).isascii() and tokenizer.decode([i]) != "" for i in range(config.vocab)])
    keep = np.zeros((len(params["head"]["table"]), 1), np.float32)
    keep[: config.vocab, 0] = plain
    params["embedding"]["table"] = params["embedding"]["table"] * np.float32(50)
    params["head"]["table"] = params["head"]["table"] * (np.float32(50) * keep)
    return jax.device_put(params)


@pytest.fixture(scope="session")
def generator(config: Llama, stacked: Params, tokenizer: TextTokenizer) -> Generator:
    return Generator(config.spec(), unstack_layers(config.spec(), stacked), tokenizer)


class FullForward:
    """Log-probabilities from the scanned model over the whole text at once, without a cache."""

    def __init__(self, config: Llama, params: Params, tokenizer: TextTokenizer) -> None:
        self.tokenizer, spec = tokenizer, config.spec()

        @jax.jit
        def run(tokens: jax.Array) -> jax.Array:
            scores = logits(spec, params, apply(spec, params, Inputs.whole(tokens)).hidden)
            return jax.nn.log_softmax(scores[0, :, : config.vocab])

        self.run = run

    def __call__(self, prompt: str, tokens: tuple[int, ...]) -> np.ndarray:
        """Float32 [completion, vocab]: what each token of a completion was chosen from."""
        before = [self.tokenizer.end_id, *self.tokenizer.encode(prompt)]
        row = np.zeros((1, CONTEXT), np.int32)
        row[0, : len(before) + len(tokens)] = [*before, *tokens]
        return np.asarray(self.run(row))[len(before) - 1 : len(before) + len(tokens) - 1]


@pytest.fixture(scope="session")
def full_forward(config: Llama, stacked: Params, tokenizer: TextTokenizer) -> FullForward:
    return FullForward(config, stacked, tokenizer)
