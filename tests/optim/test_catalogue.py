"""Each optimizer against float64 references written from its paper, and on eight devices against one."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmx.checkpoint.checkpointer import Checkpointer
from lmx.checkpoint.config import CheckpointConfig
from lmx.errors import UserError
from lmx.optim.catalogue import Adafactor, AdEMAMix, Lion, Muon, Sgd, Sophia, matrices
from lmx.optim.optimizer import AdamW, Optimizer
from lmx.optim.placement import placed
from lmx.sharding.mesh import MeshConfig, build_mesh
from lmx.sharding.rules import Rules, Sharding

STEPS = 3
BLOCK = "stack/segment_0/block_0/"
QUERY, OUT, UP, BIAS = (
    BLOCK + name for name in ("attention/query/kernel", "attention/out/kernel", "moe/experts/up/kernel", "mlp/up/bias")
)
TABLE = "embedding/table"
SHAPES = {QUERY: (2, 8, 4, 2), OUT: (2, 4, 2, 8), UP: (2, 2, 8, 16), BIAS: (2, 16), TABLE: (24, 8)}
AXES = {
    QUERY: ("layers", "embed", "heads", "head_dim"),
    OUT: ("layers", "heads", "head_dim", "embed"),
    UP: ("layers", "expert", "embed", "mlp"),
    BIAS: ("layers", "mlp"),
    TABLE: ("vocab", "embed"),
}
ALL: dict[str, Optimizer] = {
    "adamw": AdamW(),
    "sgd": Sgd(momentum=0.8),
    "nesterov": Sgd(momentum=0.8, nesterov=True),
    "lion": Lion(b1=0.8, b2=0.9),
    "adafactor": Adafactor(factored_from=4, clip=0.5),
    "muon": Muon(momentum=0.8),
    "sophia": Sophia(interval=2, b1=0.8, b2=0.7, gamma=0.5),
    "ademamix": AdEMAMix(b3=0.99, alpha=3.0, warmup=2),
}


def nested(flat: dict) -> dict:
    tree: dict = {}
    for name, leaf in flat.items():
        node = functools.reduce(lambda n, key: n.setdefault(key, {}), name.split("/")[:-1], tree)
        node[name.rsplit("/", 1)[1]] = leaf
    return tree


def drawn(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}


HESSIAN = {name: np.abs(leaf) - 0.2 for name, leaf in drawn(99).items()}


def objective(params: dict) -> jax.Array:
    """Its Hessian is diagonal, so that Hutchinson's estimate is exact."""
    halves = jax.tree.map(lambda p, h: 0.5 * jnp.sum(h * p * p), params, nested(HESSIAN))
    return sum(jax.tree.leaves(halves))


def updates_of(optimizer: Optimizer, sharding: Sharding | None = None) -> tuple[dict, object]:
    """The last of some updates, and the optimizer's state."""
    params, axes = nested(drawn(0)), nested(AXES)
    transformation = replace(optimizer, weight_decay=0.0).build(axes)
    grads = [nested(drawn(step)) for step in range(1, STEPS + 1)]
    of_params = of_state = None
    if sharding is not None:
        of_params = sharding.tree(axes)
        of_state = placed(jax.eval_shape(transformation.init, params), params, axes, sharding.named)
        params, *grads = (jax.device_put(tree, of_params) for tree in (params, *grads))

    @functools.partial(jax.jit, out_shardings=None if sharding is None else (of_params, of_state))
    def step(params, state, grad):
        return transformation.update(grad, state, params, obj_fn=objective)

    state = jax.jit(transformation.init, out_shardings=of_state)(params)
    for grad in grads:
        updates, state = step(params, state, grad)
    return updates, state


@functools.cache
def found(name: str) -> tuple[dict, object]:
    return updates_of(ALL[name])


def sgd(o, name, grads, p):
    m = np.zeros_like(p)
    for g in grads:
        m = g + o.momentum * m
    return g + o.momentum * m if o.nesterov else m


def lion(o, name, grads, p):
    m = np.zeros_like(p)
    for g in grads:
        step = np.sign(o.b1 * m + (1 - o.b1) * g)
        m = o.b2 * m + (1 - o.b2) * g
    return step


def adamw(o, name, grads, p):
    m = v = np.zeros_like(p)
    for g in grads:
        m, v = o.b1 * m + (1 - o.b1) * g, o.b2 * v + (1 - o.b2) * g * g
    t = len(grads)
    return m / (1 - o.b1**t) / (np.sqrt(v / (1 - o.b2**t)) + o.eps)


def adafactor(o, name, grads, p):
    """Algorithm 4, the second moments over the two longest axes of the whole array."""
    rows = cols = v = 0.0
    small, large = np.argsort(p.shape)[-2:]
    factored = p.ndim > 1 and p.shape[small] >= o.factored_from
    for t, g in enumerate(grads, 1):
        decay, square = 1 - t**-o.decay, g * g + 1e-30
        rows = decay * rows + (1 - decay) * square.mean(large, keepdims=True)
        cols = decay * cols + (1 - decay) * square.mean(small, keepdims=True)
        v = decay * v + (1 - decay) * square
        step = g / np.sqrt(rows * cols / rows.mean(small, keepdims=True) if factored else v)
        step = step / max(1, np.sqrt((step**2).mean()) / o.clip)
    return step * max(1e-3, np.sqrt((p**2).mean()))


def newton_schulz(x: np.ndarray, iterations: int) -> np.ndarray:
    x = x / np.linalg.norm(x)
    for _ in range(iterations):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x


def muon(o, name, grads, p):
    own = {QUERY: (2, 8, 8), OUT: (2, 8, 8), UP: (4, 8, 16)}.get(name)
    if own is None:
        return adamw(o, name, grads, p)
    m, b = np.zeros_like(p), o.momentum
    for g in grads:
        m = b * m + (1 - b) * g
    t = len(grads)
    ahead = b * m / (1 - b ** (t + 1)) + (1 - b) * g / (1 - b**t)
    found = [newton_schulz(matrix, o.iterations) for matrix in ahead.reshape(own)]
    return o.rms * np.sqrt(max(own[1:])) * np.stack(found).reshape(p.shape)


def sophia(o, name, grads, p):
    m = h = np.zeros_like(p)
    for t, g in enumerate(grads, 1):
        m = o.b1 * m + (1 - o.b1) * g
        step = np.clip(m / (1 - o.b1**t) / np.maximum(o.gamma * h, o.eps), -1, 1)
        if (t - 1) % o.interval == 0:
            h = o.b2 * h + (1 - o.b2) * HESSIAN[name]
    return step


def ademamix(o, name, grads, p):
    fast = slow = v = np.zeros_like(p)
    for t, g in enumerate(grads, 1):
        share = min(1, t / o.warmup)
        low, high = np.log(o.b1), np.log(o.b3)
        b3 = min(o.b3, np.exp(low * high / ((1 - share) * high + share * low)))
        fast, slow = o.b1 * fast + (1 - o.b1) * g, b3 * slow + (1 - b3) * g
        v = o.b2 * v + (1 - o.b2) * g * g
    fast, v = fast / (1 - o.b1**t), v / (1 - o.b2**t)
    return (fast + o.alpha * min(1, t / o.warmup) * slow) / (np.sqrt(v) + o.eps)


REFERENCES = {
    "adamw": adamw,
    "sgd": sgd,
    "nesterov": sgd,
    "lion": lion,
    "adafactor": adafactor,
    "muon": muon,
    "sophia": sophia,
    "ademamix": ademamix,
}


@pytest.mark.parametrize("name", ALL)
def test_steps_equal_a_float64_reference(name):
    updates, _ = found(name)
    for leaf, p in drawn(0).items():
        grads = [drawn(step)[leaf].astype(np.float64) for step in range(1, STEPS + 1)]
        expected = REFERENCES[name](ALL[name], leaf, grads, p.astype(np.float64))
        own = functools.reduce(lambda tree, key: tree[key], leaf.split("/"), updates)
        np.testing.assert_allclose(own, expected, rtol=3e-5, atol=3e-6, err_msg=leaf)


def eight() -> Sharding:
    return Sharding(build_mesh(MeshConfig(data=1, fsdp=4, tensor=2), jax.devices()), Rules())


@pytest.mark.parametrize("name", ["muon", "adafactor", "sophia"])
def test_eight_devices_equal_one(name):
    one, many = found(name), updates_of(ALL[name], eight())
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(many), strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=2e-5, atol=2e-6)


def test_state_lies_as_the_parameters_do():
    params, axes = nested(drawn(0)), nested(AXES)
    for name, optimizer in ALL.items():
        state = jax.eval_shape(optimizer.build(axes).init, params)
        tree = placed(state, params, axes, lambda own: own)
        laid = jax.tree.leaves(tree, is_leaf=lambda x: type(x) is tuple and all(isinstance(a, str | None) for a in x))
        for leaf, own in zip(jax.tree.leaves(state), laid, strict=True):
            assert len(own) == len(leaf.shape), name
            if leaf.size >= 32 and name != "adafactor":
                assert own in AXES.values(), name


def test_factored_moments_lose_an_axis():
    params, axes = nested(drawn(0)), nested(AXES)
    state = jax.eval_shape(Adafactor(factored_from=4).build(axes).init, params)
    factored = placed(state, params, axes, lambda own: own)[0][0]
    assert factored.v_row["embedding"]["table"] == ("embed",)
    assert factored.v_col["embedding"]["table"] == ("vocab",)
    experts = (tree["stack"]["segment_0"]["block_0"]["moe"]["experts"]["up"]["kernel"] for tree in factored[1:3])
    assert list(experts) == [("layers", "expert", "embed"), ("layers", "expert", "mlp")]


def test_muon_takes_hidden_matrices_only(golden):
    from lmx.models.model import param_axes

    own = matrices(param_axes(golden.spec))
    assert all(name.startswith("stack/segment_") and name.endswith("kernel") for name in own)
    query = own[QUERY]
    assert (query.lead, query.inputs, query.outputs) == (1, 1, 2)


def test_routers_are_not_matrices():
    from lmx.models.families.mixtral import Mixtral
    from lmx.models.model import param_axes

    model = Mixtral(layers=2, width=16, heads=2, kv_heads=1, head_dim=8, hidden=8, vocab=64, context=8)
    own = matrices(param_axes(model.spec()))
    assert not any("router" in name for name in own)
    assert own["stack/segment_0/block_0/moe/experts/up/kernel"].lead == 2


@pytest.mark.parametrize("name", ["lion", "muon", "ademamix"])
def test_bfloat16_moments(name):
    optimizer = replace(ALL[name], moments="bfloat16")
    (exact, _), (near, state) = found(name), updates_of(optimizer)
    kinds = {str(leaf.dtype) for leaf in jax.tree.leaves(state) if leaf.size >= 32}
    assert kinds == ({"bfloat16", "float32"} if optimizer.exact else {"bfloat16"})
    a, b = (np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)]) for tree in (exact, near))
    assert 0 < np.linalg.norm(a - b) < (0.2 if name == "lion" else 0.05) * np.linalg.norm(a) or name == "lion"


def test_adafactor_has_no_bfloat16_moments():
    with pytest.raises(UserError, match="Adafactor's second moments soon change"):
        replace(ALL["adafactor"], moments="bfloat16").check([])


def test_states_survive_a_checkpoint(tmp_path):
    states = {name: found(name)[1] for name in ("muon", "sophia")}
    with Checkpointer(tmp_path / "checkpoints", CheckpointConfig(asynchronous=False)) as checkpointer:
        checkpointer.save(1, states, {})
        again = checkpointer.restore(jax.eval_shape(lambda: states))
    assert again is not None
    jax.tree.map(np.testing.assert_array_equal, again.state, states)


@pytest.mark.parametrize("name", ALL)
def test_each_lowers_a_loss(name):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(64, 8)).astype(np.float32), rng.normal(size=(64, 4)).astype(np.float32)
    kernels = {"up": rng.normal(size=(1, 8, 16)), "down": rng.normal(size=(1, 16, 4))}
    axes = {"up": ("layers", "embed", "mlp"), "down": ("layers", "mlp", "embed")}
    place = lambda part: {"stack": {"segment_0": {"block_0": {k: {"kernel": v} for k, v in part.items()}}}}  # noqa: E731
    transformation = ALL[name].build(place(axes))
    rate = {"sgd": 0.02, "nesterov": 0.02, "lion": 3e-3, "sophia": 3e-3}.get(name, 1e-2)

    def loss(params):
        block = params["stack"]["segment_0"]["block_0"]
        return jnp.mean(jnp.square(jnp.tanh(x @ block["up"]["kernel"][0]) @ block["down"]["kernel"][0] - y))

    @jax.jit
    def step(params, state):
        value, grads = jax.value_and_grad(loss)(params)
        updates, state = transformation.update(grads, state, params, obj_fn=loss)
        return jax.tree.map(lambda p, u: p - rate * u, params, updates), state, value

    params = place({k: jnp.asarray(v * 0.3, jnp.float32) for k, v in kernels.items()})
    state, losses = transformation.init(params), []
    for _ in range(30):
        params, state, value = step(params, state)
        losses.append(float(value))
    assert losses[-1] < 0.9 * losses[0]
