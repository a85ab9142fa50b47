"""The models that a loss reads and no step changes: teachers, references."""

from dataclasses import replace
from pathlib import Path

from lmx.data.prepare import Prepared
from lmx.decode.sources import Source, open_source, require_tokens
from lmx.errors import UserError
from lmx.experiment import Experiment
from lmx.models.config_map import CLASSIFYING
from lmx.objectives.objective import Frozen
from lmx.sharding.rules import Sharding


def load_frozen(experiment: Experiment, sharding: Sharding, prepared: Prepared) -> dict[str, Frozen]:
    """The models that the experiment's objective names, laid out by the rules, in the dtype that it computes in.

    Raises:
      UserError: there is no such model, it does not fit the objective, or it was trained on other tokens.
    """
    return {
        name: _loaded(name, path or experiment.init_from, experiment, sharding, prepared)
        for name, path in experiment.objective.models.items()
    }


def _loaded(name: str, path: str, experiment: Experiment, sharding: Sharding, prepared: Prepared) -> Frozen:
    if not path:
        raise UserError(
            f"objective.{name} names no model, and init_from none that could stand for it: give --objective.{name} the "
            "directory of a trained one"
        )
    source = open_source(Path(path))
    _check_fits(name, source, experiment, prepared)
    params, _ = source.read(experiment.train.compute, sharding, None)
    return Frozen(source.config.spec(), params)


def _check_fits(name: str, source: Source, experiment: Experiment, prepared: Prepared) -> None:
    """Raises UserError unless the model could be trained in the experiment's own place, sizes apart."""
    length = experiment.train.length
    if source.config.context < length:
        raise UserError(
            f"objective.{name} {source.path} has a context of {source.config.context}, shorter than train.length "
            f"{length}: take another, or a lower train.length"
        )
    if source.config.vocab != experiment.model.vocab:
        raise UserError(
            f"objective.{name} {source.path} has {source.config.vocab} tokens and model.vocab is "
            f"{experiment.model.vocab}: both models must predict the same"
        )
    require_tokens(source, prepared.tokenizer, f"objective.{name}")
    experiment.objective.check(source.config, length)
    _check_reads(name, source, experiment, prepared)
    if source.config.task in CLASSIFYING:
        _check_classes(name, source, experiment, prepared)


def _check_reads(name: str, source: Source, experiment: Experiment, prepared: Prepared) -> None:
    """Raises UserError for a model that asks more of a row than the trained one's rows have."""
    own, other = (
        set(replace(experiment, model=config).layout(prepared.tokenizer).empty())
        for config in (experiment.model, source.config)
    )
    if other - own - {"types"}:  # which are 0 where a row has none
        raise UserError(
            f"objective.{name} {source.path} is a {source.config.family}, whose rows are others than those of a "
            f"{experiment.model.family}: take one that is a decoder, an encoder or an encoder-decoder as the model is"
        )


def _check_classes(name: str, source: Source, experiment: Experiment, prepared: Prepared) -> None:
    """Raises UserError for a classifier of other classes than the data's."""
    ours, count = prepared.classes, source.config.classes
    unnamed = tuple(f"LABEL_{i}" for i in range(count))
    if count != experiment.model.classes or source.classes not in ((), unnamed, ours):
        theirs = f" ({', '.join(source.classes[:6])})" if source.classes else ""
        raise UserError(
            f"objective.{name} {source.path} tells {count} classes{theirs}, and the data has {len(ours)} "
            f"({', '.join(ours[:6])}): both must have the same, in the same order; data.sources.0.classes sets the "
            "data's"
        )
