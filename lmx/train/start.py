"""The state that a run starts from, or goes on from."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax

from lmx import config
from lmx.adapters.adapter import Lora
from lmx.adapters.base import check_base, checksum, write_base
from lmx.adapters.peft import read_peft
from lmx.checkpoint.checkpointer import Checkpointer
from lmx.checkpoint.graft import Graft, graft
from lmx.data.tokenizer import TextTokenizer
from lmx.decode.sources import Source, open_source, require_tokens
from lmx.errors import UserError
from lmx.experiment import Experiment, RunDir
from lmx.models.model import init_params, param_shapes
from lmx.nn.module import Params
from lmx.optim.names import names, put
from lmx.sharding.processes import agreed, is_first
from lmx.sharding.rules import Sharding
from lmx.train.state import TrainState, init_state, jit_init, saved, state_shapes, state_shardings, trained


def start_state(
    experiment: Experiment, run: RunDir, sharding: Sharding, checkpointer: Checkpointer, tokenizer: TextTokenizer
) -> tuple[TrainState, int, dict[str, Any], list[str]]:
    """The state to start from, its step, the checkpoint's meta data, and what there is to say about it.

    The model of ``init_from`` is read at the first start, and beside an adapter; its tokens must be ``tokenizer``'s.
    """
    shardings, shapes = state_shardings(experiment, sharding), state_shapes(experiment)
    target = jax.tree.map(lambda s, p: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=p), shapes, shardings)
    restored = checkpointer.restore(saved(experiment, target))
    if restored is None:
        state, base, notes = fresh_state(experiment, sharding, tokenizer)
        with agreed():
            if base and is_first():
                write_base(run.base, experiment.init_from, base)
        return state, 0, {}, notes
    skipped = [f"checkpoint {step} was not used: {reason}" for step, reason in restored.skipped]
    origin = ", from the local checkpoints" if restored.local else ""
    notes = [*skipped, f"going on after step {restored.step}{origin}"]
    if not experiment.adapter.alone:
        return restored.state, restored.step, restored.meta, notes
    state, base, _ = _initial(experiment, sharding, tokenizer)
    with agreed():
        check_base(run.base, experiment.init_from, base)
    return replace(restored.state, params=put(state.params, restored.state.params)), restored.step, restored.meta, notes


def fresh_state(
    experiment: Experiment, sharding: Sharding, tokenizer: TextTokenizer
) -> tuple[TrainState, str, list[str]]:
    """A state at step 0, the checksum of the model beside an adapter ("" without one), and what there is to say."""
    state, base, notes = _initial(experiment, sharding, tokenizer)
    if isinstance(experiment.adapter, Lora) and experiment.adapter.start:
        state = _with_adapter(experiment, experiment.adapter, state, state_shardings(experiment, sharding))
        notes.append(f"adapter of {experiment.adapter.start}")
    return state, base, notes


def _initial(experiment: Experiment, sharding: Sharding, tokenizer: TextTokenizer) -> tuple[TrainState, str, list[str]]:
    """The same without the adapter that it may start from."""
    key = jax.random.key(experiment.train.seed)
    if not experiment.init_from:
        return jit_init(experiment, sharding)(key), "", _counted(experiment)
    source = open_source(Path(experiment.init_from))
    require_tokens(source, tokenizer, "init_from")
    grafted = _grafted(experiment, source)
    params, step = source.read("float32", sharding, None)

    def started(key: jax.Array, params: Params) -> TrainState:
        own = init_params(experiment.model.spec(), key)
        return init_state(experiment, key, grafted.joined(own, params))

    state = jax.jit(started, out_shardings=state_shardings(experiment, sharding))(key, params)
    note = f"weights of {source.path}" + (f" after step {step}" if source.experiment else "") + grafted.note
    return state, checksum(params) if experiment.adapter.alone else "", [note, *_counted(experiment)]


def _with_adapter(experiment: Experiment, adapter: Lora, state: TrainState, shardings: TrainState) -> TrainState:
    """The state with the arrays of the adapter that it is to start from."""
    read, own = read_peft(experiment.model, adapter, Path(adapter.start)), trained(experiment, state.params)
    if set(names(read)) != set(names(own)):
        other = sorted(set(names(read)) ^ set(names(own)))[0]
        raise UserError(f"adapter.start {adapter.start} and adapter.targets name different parameters, as {other}")
    placed = jax.tree.map(jax.device_put, read, trained(experiment, shardings.params))
    ema = jax.tree.map(lambda a: a.copy(), placed) if state.ema else state.ema
    return replace(state, params=put(state.params, placed), ema=ema)


def _counted(experiment: Experiment) -> list[str]:
    """A sentence where not all is trained."""
    shapes, total = state_shapes(experiment), param_shapes(experiment.model.spec())
    own, whole = (sum(leaf.size for leaf in jax.tree.leaves(t)) for t in (trained(experiment, shapes.params), total))
    return [] if own == whole else [f"{own:,} numbers are trained; the model has {whole:,} ({own / whole:.2%})"]


def _grafted(experiment: Experiment, source: Source) -> Graft:
    """How the source's parameters become those of the experiment's model; raises UserError if they differ in more than
    their heads, or if an adapter would stand beside fresh ones that are not trained with it."""
    grafted = graft(param_shapes(experiment.model.spec()), param_shapes(source.config.spec()))
    if grafted is None:
        changes = config.diff(source.config, experiment.model)
        raise UserError(
            f"the model of init_from {source.path} is not this recipe's: {'; '.join(map(str, changes[:5]))}; take its "
            "sizes over, or another init_from"
        )
    untrained = [name for name in grafted.fresh if experiment.adapter.alone and not experiment.trains(name)]
    if untrained:
        raise UserError(
            f"the model of init_from {source.path} has no {untrained[0]}, and an adapter alone does not train it: name "
            "it in adapter.also"
        )
    return grafted
