import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lmx.errors import UserError
from lmx.experiment import Experiment, TrainConfig
from lmx.models.families.bert import Bert
from lmx.models.families.gpt2 import Gpt2
from lmx.models.families.llama import Llama
from lmx.models.specs import noisy
from lmx.nn.position import Rope
from lmx.objectives.classification import Classification, Regression
from lmx.objectives.labelled import Labelled
from lmx.objectives.next_token import NextToken
from lmx.objectives.random_rows import full_rows
from lmx.optim.optimizer import AdamW
from lmx.optim.schedule import Schedule
from lmx.sharding.mesh import MeshConfig, build_mesh
from lmx.sharding.rules import Sharding
from lmx.train.state import TrainState, init_state, state_shardings
from lmx.train.step import jit_step, train_step

BATCH, LENGTH = 8, 16
LLAMA = Llama(
    vocab=203,
    context=LENGTH,
    layers=2,
    width=32,
    heads=8,
    kv_heads=4,
    head_dim=8,
    hidden=64,
    rope=Rope(500.0),
)
BASE = Experiment(
    model=LLAMA,
    objective=NextToken(z_loss=1e-3),
    optimizer=AdamW(eps=1e-5),  # well above the rounding of a gradient, which Adam would blow up to a whole step
    schedule=Schedule(peak=1e-3, warmup=1, shape="constant"),
    train=TrainConfig(steps=10, batch=BATCH, length=LENGTH, remat="none"),
)


def changed(base: Experiment = BASE, **train) -> Experiment:
    return replace(base, train=replace(base.train, **train))


def batch_of(seed: int, vocab: int = 203) -> dict[str, jax.Array]:
    """Two documents and padding a row; the rows hold between 2 and 16 targets."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, vocab, (BATCH, LENGTH + 1)).astype(np.int32)
    columns, ends = np.arange(LENGTH)[None], np.linspace(2, LENGTH, BATCH).astype(int)[:, None]
    segments = np.where(columns < ends // 2, 1, np.where(columns < ends, 2, 0)).astype(np.int32)
    positions = np.where(segments == 2, columns - ends // 2, np.where(segments == 1, columns, 0)).astype(np.int32)
    arrays = {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "segment_ids": segments,
        "positions": positions,
    }
    return jax.tree.map(jnp.asarray, arrays)


def sharding_of(experiment: Experiment, sizes: tuple[int, int, int] = (1, 1, 1)) -> Sharding:
    devices = jax.devices()[: int(np.prod(sizes))]
    data, fsdp, tensor = sizes
    return Sharding(build_mesh(MeshConfig(data=data, fsdp=fsdp, tensor=tensor), devices), experiment.rules)


@functools.cache
def fresh(experiment: Experiment) -> TrainState:
    """The first state, on the host."""
    return jax.device_get(jax.jit(functools.partial(init_state, experiment))(jax.random.key(0)))


def start(experiment: Experiment, sharding: Sharding) -> TrainState:
    state = fresh(replace(BASE, model=experiment.model))
    return jax.device_put(state, state_shardings(experiment, sharding))


program = functools.cache(jit_step)


def run(experiment: Experiment, steps: int = 2, sizes: tuple[int, int, int] = (1, 1, 1)):
    """The state after some steps, and each step's metrics."""
    sharding = sharding_of(experiment, sizes)
    step, state, metrics = program(experiment, sharding), start(experiment, sharding), []
    for i in range(steps):
        state, new = step(state, jax.device_put(batch_of(i), sharding.named(("act_batch", "act_length"))))
        metrics.append(jax.device_get(new))
    return jax.device_get(state), metrics


@pytest.fixture(scope="module")
def whole():
    """Two steps on one device, the batch at once."""
    return run(BASE)


def assert_close(a, b, **tolerance):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tolerance), a, b)


def test_accumulation_equals_the_whole_batch(whole):
    state, metrics = run(changed(accumulate=4))
    assert_close(state.params, whole[0].params, atol=1e-6, rtol=0)
    assert_close(metrics, whole[1], rtol=1e-5)


def test_every_target_weighs_the_same(whole):
    """The loss is a mean over targets, not over rows, whose numbers of targets differ."""
    loss = jax.jit(functools.partial(BASE.objective.loss, LLAMA.spec()))
    rows = [jax.tree.map(lambda a, r=row: a[r : r + 1], batch_of(0)) for row in range(BATCH)]
    sums = [loss(fresh(BASE).params, row) for row in rows]
    targets = sum(float(s.weight) for s in sums)
    assert targets == whole[1][0]["targets"] == float((batch_of(0)["segment_ids"] > 0).sum())
    assert sum(float(s.total) for s in sums) / targets == pytest.approx(whole[1][0]["loss"], rel=1e-5)


MESHES = [((8, 1, 1), 1), ((1, 8, 1), 1), ((2, 2, 2), 2), ((1, 2, 4), 1)]


@pytest.mark.parametrize(("sizes", "accumulate"), MESHES, ids=str)
def test_eight_devices_equal_one(whole, sizes, accumulate):
    state, metrics = run(changed(accumulate=accumulate), sizes=sizes)
    for ours, one in zip(metrics, whole[1], strict=True):
        for name in ("loss", "nll", "grad_norm"):
            assert ours[name] == pytest.approx(one[name], rel=1e-5)
        assert (ours["targets"], ours["accuracy"]) == (one["targets"], pytest.approx(one["accuracy"]))
    assert_close(state.params, whole[0].params, atol=1e-5, rtol=0)


def test_dropout_on_a_mesh_equals_one_device():
    gpt2 = Gpt2(vocab=203, context=LENGTH, layers=1, width=32, heads=4, dropout=0.2)
    (_, one), (_, many) = (run(replace(BASE, model=gpt2), 1, sizes) for sizes in ((1, 1, 1), (2, 2, 2)))
    assert many[0]["loss"] == pytest.approx(one[0]["loss"], rel=1e-5)
    assert many[0]["grad_norm"] == pytest.approx(one[0]["grad_norm"], rel=1e-5)


def test_a_step_draws_what_the_configuration_says(whole):
    drawn = {"stochastic_depth": ("depth", 0.5), "token_dropout": ("drop", 0.25), "token_swap": ("swap", 0.125)}
    for name, (what, rate) in drawn.items():
        assert changed(**{name: rate}).spec() == noisy(LLAMA.spec(), **{what: rate}) != LLAMA.spec()
    _, metrics = run(changed(**{name: rate for name, (_, rate) in drawn.items()}), 1)
    assert metrics[0]["loss"] != pytest.approx(whole[1][0]["loss"], rel=1e-4)


def test_parameters_are_cut_by_the_rules():
    sharding = sharding_of(BASE, (2, 2, 2))
    state = start(BASE, sharding)
    kernel = state.params["stack"]["segment_0"]["block_0"]["mlp"]["up"]["kernel"]
    assert kernel.addressable_shards[0].data.shape == (2, 16, 32)
    moments = [a for a in jax.tree.leaves(state.optimizer) if a.shape == kernel.shape]
    assert len(moments) >= 2
    assert all(m.sharding == kernel.sharding for m in moments)


def test_a_mesh_that_does_not_divide_the_batch_says_so():
    with pytest.raises(UserError, match="splits the batch into 8, which does not divide the 4 sequences"):
        state_shardings(changed(accumulate=2), sharding_of(BASE, (8, 1, 1)))


def test_the_state_is_donated():
    sharding = sharding_of(BASE)
    before = start(BASE, sharding)
    program(BASE, sharding)(before, batch_of(0))
    assert all(a.is_deleted() for a in jax.tree.leaves(before))


def adam(state: TrainState) -> optax.ScaleByAdamState:
    is_adam = lambda x: isinstance(x, optax.ScaleByAdamState)  # noqa: E731
    return next(s for s in jax.tree.leaves(state.optimizer, is_leaf=is_adam) if is_adam(s))


def test_clipping_scales_to_the_norm(whole):
    clip = 0.01
    state, metrics = run(replace(BASE, optimizer=replace(BASE.optimizer, clip_norm=clip)), 1)
    assert metrics[0]["grad_norm"] == pytest.approx(whole[1][0]["grad_norm"], rel=1e-5)
    assert metrics[0]["grad_norm"] > 10 * clip
    assert float(optax.global_norm(adam(state).mu)) == pytest.approx(clip * (1 - AdamW().b1), rel=1e-5)


DECAY = 0.75


@pytest.fixture(scope="module")
def averaging():
    """A first state and a step with an average of the parameters."""
    state = jax.tree.map(jnp.asarray, fresh(BASE))
    return replace(state, ema=state.params), jax.jit(functools.partial(train_step, changed(ema=DECAY)))


def test_the_average_of_the_parameters(averaging, whole):
    first, step = averaging
    second, _ = step(first, batch_of(0))
    third, _ = step(second, batch_of(1))
    expected = jax.tree.map(
        lambda a, b, c: DECAY * (DECAY * a + (1 - DECAY) * b) + (1 - DECAY) * c,
        *(state.params for state in (first, second, third)),
    )
    assert_close(third.ema, expected, atol=1e-7)
    assert_close(third.for_eval, third.ema, atol=0)
    assert whole[0].ema == {}
    assert_close(whole[0].for_eval, whole[0].params, atol=0)


def test_a_bad_gradient_skips_the_update_and_counts(averaging):
    good, step = averaging
    batch, scale = batch_of(0), good.params["final_norm"]["scale"]
    bad = replace(good, params={**good.params, "final_norm": {"scale": scale.at[0].set(jnp.nan)}})
    after, metrics = step(step(bad, batch)[0], batch)
    for name in ("params", "optimizer", "ema"):
        jax.tree.map(np.testing.assert_array_equal, getattr(after, name), getattr(bad, name))
    assert [int(x) for x in (after.step, after.skipped, after.skipped_in_a_row)] == [2, 2, 2]
    assert not np.isfinite(metrics["grad_norm"])
    well, metrics = step(replace(after, params=good.params), batch)
    assert [int(x) for x in (well.step, well.skipped, well.skipped_in_a_row)] == [3, 2, 0]
    assert np.isfinite(metrics["grad_norm"])
    assert np.any(well.params["embedding"]["table"] != good.params["embedding"]["table"])


def test_bfloat16_compute_is_near_and_keeps_float32_parameters(whole):
    state, metrics = run(changed(compute="bfloat16"))
    assert {a.dtype for a in jax.tree.leaves(state.params)} == {np.dtype(np.float32)}
    assert metrics[0]["loss"] == pytest.approx(whole[1][0]["loss"], rel=2e-3)
    assert metrics[0]["loss"] != whole[1][0]["loss"]
    assert metrics[0]["grad_norm"] == pytest.approx(whole[1][0]["grad_norm"], rel=0.03)


def test_training_lowers_the_loss():
    sharding = sharding_of(BASE)
    step, state, losses = program(BASE, sharding), start(BASE, sharding), []
    for _ in range(60):
        state, metrics = step(state, batch_of(0))
        losses.append(float(metrics["nll"]))
    assert losses[0] == pytest.approx(np.log(203), rel=0.02)
    assert losses[-1] < losses[0] - 2


@pytest.mark.parametrize(("objective", "expected"), [(Regression(), False), (Classification(), True)])
def test_numbers_have_no_accuracy(objective: Labelled, expected: bool) -> None:
    model = Bert(vocab=128, context=16, layers=1, width=16, heads=2, hidden=16, task="sequence_classification")
    base = Experiment(model=model, objective=objective, train=TrainConfig(batch=8, length=16, remat="none"))
    rows = full_rows(objective, model.spec(), 8, 16)
    step = functools.partial(train_step, base)
    state = jax.eval_shape(functools.partial(init_state, base), jax.random.key(0))
    assert ("accuracy" in jax.eval_shape(step, state, rows)[1]) == expected
