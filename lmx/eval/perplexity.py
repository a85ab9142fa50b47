"""Scores of packed held-out rows: what a model's objective predicts in them, or next tokens."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from lmx.config import to_data
from lmx.data.config import DataConfig
from lmx.data.loader import Loader
from lmx.data.prepare import Prepared, prepare
from lmx.data.rows import held_out_rows, spread
from lmx.data.tokenizer import TextTokenizer
from lmx.decode.forward import is_encoder
from lmx.decode.frozen import load_frozen
from lmx.decode.loaded import Model
from lmx.errors import UserError
from lmx.eval.labelled import example_measures
from lmx.eval.run import Result
from lmx.eval.score import Score, Sums, jit_row_sums, on_host, score
from lmx.eval.standard_errors import row_measures
from lmx.experiment import Compute, Experiment, TrainConfig
from lmx.models.schedules import PipelineConfig, check_pipeline
from lmx.models.specs import ModelSpec
from lmx.objectives.objective import Batch
from lmx.objectives.vocabulary import Vocabulary
from lmx.sharding.mesh import MeshConfig, build_mesh
from lmx.sharding.processes import agreed, is_first
from lmx.sharding.rules import Sharding

BATCH = ("act_batch", "act_length")
LENGTH = 1024
"""Tokens in a row for a model of no run, where its context is longer."""


@dataclass(frozen=True, kw_only=True)
class Evaluation(Score):
    """A score; ``result`` has its numbers with their standard errors, and how it was made."""

    result: Result


def evaluate(
    model: Model,
    data: DataConfig,
    *,
    length: int = 0,
    batch: int = 8,
    rows: int = 0,
    recipe: Experiment | None = None,
) -> Evaluation:
    """The score of a model on the held-out documents of ``data``, prepared if need be.

    Args:
      model: a loaded one: of a run, it is scored on what its objective predicts, else on what the recipe's does, or on
        next tokens.
      data: the documents; its tokenizer must be the model's.
      length: tokens in a row; 0 is the run's or the recipe's training length, or 1024 (at most the context) of a model
        of no run.
      batch: rows at once.
      rows: how many rows to score; 0 for all.
      recipe: of a model of no run: whose objective it is scored on.

    Raises:
      UserError: a model that does not predict the next token, or not what the recipe's objective does, rows longer than
        its context, a tokenizer of more tokens than it has, or nothing to score; a mesh that does not divide the batch
        or the rows.
    """
    experiment = _sized(model.experiment or _unrun(model, recipe), model, length)
    sharding = model.sharding or Sharding(build_mesh(MeshConfig(data=1), jax.local_devices()[:1]), experiment.rules)
    _check_mesh(experiment, sharding, batch)
    with agreed():
        prepared = prepare(data, progress=is_first())
    require_tokens_fit(prepared.tokenizer, model.spec)
    sums = _row_sums(model, experiment, sharding, prepared, (batch, rows))
    settings = {"type": "held_out", "objective": to_data(experiment.objective), "length": experiment.train.length}
    return _evaluation(experiment, sums, sharding.ways(BATCH[0]), {**settings, "rows": rows, "data": to_data(data)})


def _sized(experiment: Experiment, model: Model, length: int) -> Experiment:
    """The experiment with rows of ``length``, if that is not 0, that fit the model."""
    if length > model.spec.context:
        raise UserError(f"--length {length} is longer than the model's context of {model.spec.context}")
    sized = replace(experiment, train=replace(experiment.train, length=length or experiment.train.length))
    sized.objective.check(sized.model, sized.train.length)
    return sized


def _row_sums(
    model: Model, experiment: Experiment, sharding: Sharding, prepared: Prepared, size: tuple[int, int]
) -> Iterable[Sums]:
    """The sums of each group of rows, batch by batch; ``size`` is how many rows a batch has, and how many are read."""
    tokenizer, objective = prepared.tokenizer, experiment.objective
    # The model's own spec, because a directory may name the token with which its decoder starts.
    vocabulary = Vocabulary.of(tokenizer, objective.special_tokens)
    layout = objective.layout(vocabulary, model.spec, experiment.train.length)
    held_out: Any = spread(held_out_rows(prepared, length=layout), size[1])
    token_bytes, compiled = jnp.asarray(tokenizer.token_bytes()), jit_row_sums(experiment, sharding)
    with Loader(held_out, batch=size[0], sharding=sharding.named(BATCH)) as batches:
        started = (_started(batch, tokenizer.end_id, _start(model)) for batch in batches)
        frozen = load_frozen(replace(experiment, objective=objective.evaluated), sharding, prepared)
        yield from on_host(compiled, model.params, started, token_bytes, frozen)


def _evaluation(experiment: Experiment, sums: Iterable[Sums], together: int, settings: dict[str, Any]) -> Evaluation:
    """What the sums of all batches come to, ``together`` rows in a group."""
    counts: Sums = {}
    parts = []
    for own in sums:
        counts |= {name: counts.get(name, 0.0) + own.pop(name) for name in own.keys() & {"counts"}}
        parts.append(own)
    joined: Any = jax.tree.map(lambda *a: np.concatenate(a), *parts)
    examples, objective = joined.pop("examples", None), experiment.objective.evaluated
    found = score([{name: array.sum(0) for name, array in joined.items()} | counts])
    measures = example_measures(objective, examples) if examples else row_measures(found, joined, together)
    told = {"targets": f"{found.targets:,}"} | ({"bytes of text": f"{found.bytes:,}"} if found.bytes else {})
    result = Result(next(iter(measures.values())).n, measures, settings, told)
    return Evaluation(**vars(found), result=result)


def require_tokens_fit(tokenizer: TextTokenizer, spec: ModelSpec) -> None:
    """Raises UserError for a tokenizer with more tokens than the model has."""
    if tokenizer.vocab_size > spec.vocab:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, more than the model's {spec.vocab}; it belongs to "
            "another model"
        )


def _check_mesh(experiment: Experiment, sharding: Sharding, batch: int) -> None:
    """Raises UserError, with the nearest that fits, for rows that the mesh does not divide."""
    check_pipeline(PipelineConfig(), sharding, experiment.model.spec(), batch)
    sharding.check_length(experiment.train.length)
    ways = sharding.ways(BATCH[0])
    if batch % ways:
        near = max(ways, round(batch / ways) * ways)
        raise UserError(
            f"the mesh splits the batch into {ways} (mesh axes {', '.join(sharding.axes(BATCH[0]))}), which does not "
            f"divide --batch {batch}; the nearest that it divides is {near}"
        )


def _unrun(model: Model, recipe: Experiment | None) -> Experiment:
    """The settings for a model of no run: it computes in the dtype of its parameters."""
    compute = cast(Compute, np.dtype(model.compute or model.params["embedding"]["table"].dtype).name)
    if recipe is None:
        _check_predicts(model)
    longest = LENGTH if recipe is None else recipe.train.length
    train = TrainConfig(compute=compute, length=min(longest, model.spec.context))
    return replace(recipe or Experiment(), model=model.config, train=train)


def _check_predicts(model: Model) -> None:
    name, hint = model.config.family, "give --data RECIPE, whose objective says what it is scored on"
    if is_encoder(model.spec):
        raise UserError(f"this {name} is an encoder, which has no perplexity; {hint}, or use its embed or scores")
    if model.spec.encoder is not None or model.spec.head is None:
        raise UserError(f"this {name} ({model.config.task}) does not predict the next token of a text; {hint}")


def _start(model: Model) -> int | None:
    """The token that the model expects where a document begins, if it is not the end of another."""
    return None if model.tokenizer is None else model.tokenizer.start_id


def _started(batch: Batch, end: int, start: int | None) -> Batch:
    """The batch with ``start`` in place of the end of text where documents begin."""
    if start is None:
        return batch
    begins = (batch["positions"] == 0) & (batch["tokens"] == end) & (batch["segment_ids"] > 0)
    return {**batch, "tokens": jnp.where(begins, start, batch["tokens"])}
