"""Where a model can come from: a run, a Hugging Face directory, or what ``lmx convert --to lmx`` made of either."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import jax
import numpy as np

from lmx import config as configs
from lmx.adapters.base import check_base, checksum, merge
from lmx.checkpoint.checkpointer import load_subtree
from lmx.checkpoint.huggingface import import_params, open_directory
from lmx.checkpoint.huggingface.plan import flat
from lmx.checkpoint.huggingface.tensors import read_json
from lmx.data.chat import ChatTemplate, find_template
from lmx.data.framing import as_prompted
from lmx.data.tokenizer import TextTokenizer, load_tokenizer, tokenizer_file
from lmx.decode.classified import numbered
from lmx.decode.defaults import Defaults, read_defaults
from lmx.errors import UserError
from lmx.experiment import Experiment, RunDir
from lmx.models.config import ModelConfig
from lmx.models.config_map import CLASSIFYING
from lmx.models.model import cast_floats, param_axes, param_shapes
from lmx.nn.module import Params
from lmx.optim.names import pick, put
from lmx.sharding.rules import Sharding

MODEL, CHECKPOINTS, PARAMS = "model.json", "checkpoints", "params"
KEPT = ("id2label", "label2id", "problem_type", "tokenizer_class")
"""Entries of a ``config.json`` that say nothing of the computation, and are kept when a model is converted; those that
end in ``_token_id`` too."""


PROBE = "def probe(self): return 'Grüße', 3.14159  # What two tokenizers cut alike, they cut alike in general.\n"

Read = Callable[[Any, Sharding | None, int | None], tuple[Params, int]]
"""(dtype, sharding, step) -> (params, step): reads the parameters, layers stacked, in a dtype (None: as stored), onto a
mesh (None: the first device), and of a step (None: the newest)."""


@dataclass(frozen=True)
class Source:
    """A model that is opened, its parameters not read yet.

    Attributes:
      path: the directory.
      config: the model's.
      read: reads the parameters.
      compute: the dtype to compute in; None is that of the parameters.
      tokenizer: whose prompts are as the model expects them; None where there is none.
      defaults: how it is meant to be decoded.
      template: of its chats.
      experiment: the run that it comes from, if it does.
      entries: those of a ``config.json`` that the configuration does not hold.
    """

    path: Path
    config: ModelConfig
    read: Read
    compute: str | None = None
    tokenizer: TextTokenizer | None = None
    defaults: Defaults = field(default_factory=Defaults)
    template: ChatTemplate | None = None
    experiment: Experiment | None = None
    entries: Mapping[str, Any] = field(default_factory=dict)

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the outputs of a head for classes, in order; none where they are not known (LABEL_0, ...)."""
        names = self.entries.get("id2label") or {}
        count = self.config.classes if self.config.task in CLASSIFYING else 0
        found = tuple(str(names[str(i)]) for i in range(count)) if all(str(i) in names for i in range(count)) else ()
        return () if found == numbered(count) else found


def open_source(path: Path) -> Source:
    """The model in a directory, told by what lies there.

    Raises:
      UserError: no such directory, nothing that says what the model is, or something that cannot be read.
    """
    if not path.is_dir():
        raise UserError(f"there is no directory {path}; models are read from this machine, so download it first")
    for name, opened in KINDS.items():
        if (path / name).is_file():
            return opened(path)
    names = " nor ".join(f"{name} ({what})" for name, what in WHAT.items())
    raise UserError(f"{path} is not a run directory or another model: it has neither {names}")


def _run(path: Path) -> Source:
    run = RunDir(path)
    experiment = run.load_experiment()
    spec = experiment.model.spec()

    def read(dtype: Any, sharding: Sharding | None, step: int | None) -> tuple[Params, int]:
        params, at = read_run(run, experiment, sharding, step)
        return _cast(params, dtype), at

    before = spec.encoder is None and not experiment.objective.ends_source
    own = load_tokenizer(run.tokenizer)
    framed = experiment.objective.evaluated.framed
    template = find_template(run.tokenizer, own.special_tokens)
    ending = None if template is None else template.turn_end(own)
    return Source(
        path,
        experiment.model,
        read,
        experiment.train.compute,
        as_prompted(own, before=before) if framed else own.with_end_token(before=before),
        Defaults() if ending is None else Defaults(stops=tuple({own.end_id, ending})),
        template,
        experiment,
        _class_entries(run, experiment.objective.problem),
    )


def read_run(run: RunDir, experiment: Experiment, sharding: Sharding | None, step: int | None) -> tuple[Params, int]:
    """A run's parameters, averaged if it averages them, and the checkpoint's step; an adapter is merged into the model
    beside it.

    Raises:
      UserError: that is not the model that the adapter was trained beside.
    """
    spec, adapter = experiment.model.spec(), experiment.adapter
    if adapter.alone:
        base, _ = open_source(Path(experiment.init_from)).read("float32", sharding, None)
        check_base(run.base, experiment.init_from, checksum(base))
        own, at = read_trained(run, experiment, sharding, step)
        return jax.jit(lambda base, own: merge(adapter, base, param_axes(spec), own))(base, own), at
    if experiment.train.ema and not experiment.optimizer.frozen:
        return read_trained(run, experiment, sharding, step)
    target = _placed(experiment.model, param_shapes(spec), sharding)
    restored = load_subtree(run.checkpoints_of(experiment), PARAMS, target, step)
    if not experiment.train.ema:
        return restored.state, restored.step
    return put(restored.state, read_trained(run, experiment, sharding, restored.step)[0]), restored.step


def read_trained(
    run: RunDir, experiment: Experiment, sharding: Sharding | None = None, step: int | None = None
) -> tuple[Params, int]:
    """What a run's steps changed of its parameters, averaged if it averages them, and the checkpoint's step."""
    axes, shapes = param_axes(experiment.model.spec()), param_shapes(experiment.model.spec())
    adapt = functools.partial(experiment.adapter.adapt, axes=axes, key=jax.random.key(0))
    target = pick(jax.eval_shape(adapt, shapes), experiment.trains)
    if sharding is not None:
        own = pick(experiment.adapter.axes(axes), experiment.trains)
        target = jax.tree.map(lambda s, names: s.update(sharding=sharding.named(names)), target, own)
    part = "ema" if experiment.train.ema else PARAMS
    restored = load_subtree(run.checkpoints_of(experiment), part, target, step)
    return restored.state, restored.step


def _class_entries(run: RunDir, problem: str) -> dict[str, Any]:
    """The names of a run's classes and what is asked of them, as a ``config.json`` has it; nothing without classes."""
    content: dict[str, Any] = read_json(run.data) if run.data.is_file() else {}
    names = content.get("classes", [])
    labels = {str(index): name for index, name in enumerate(names)}
    named = {"id2label": labels, "label2id": {name: int(i) for i, name in labels.items()}} if labels else {}
    return named | ({"problem_type": problem} if problem else {})


def _huggingface(path: Path) -> Source:
    checkpoint = open_directory(path)

    def read(dtype: Any, sharding: Sharding | None, step: int | None) -> tuple[Params, int]:
        _no_step(path, step)
        return import_params(checkpoint.config, checkpoint.tensors, dtype=dtype, sharding=sharding), 0

    entries = {k: v for k, v in checkpoint.config_json.items() if k.endswith("_token_id") or k in KEPT}
    return _with_texts(Source(path, checkpoint.config, read, entries=entries))


def _converted(path: Path) -> Source:
    content: dict[str, Any] = read_json(path / MODEL)
    missing = [key for key in ("config", "dtypes", "entries") if key not in content]
    if missing:
        raise UserError(f"{path / MODEL} lacks {missing[0]!r}; convert the model again")
    config = cast(ModelConfig, configs.from_data(ModelConfig, content["config"], str(path / MODEL)))

    def read(dtype: Any, sharding: Sharding | None, step: int | None) -> tuple[Params, int]:
        _no_step(path, step)
        shapes = _with_dtypes(param_shapes(config.spec()), content["dtypes"])
        restored = load_subtree(path / CHECKPOINTS, PARAMS, _placed(config, shapes, sharding))
        return _cast(restored.state, dtype), restored.step

    return _with_texts(Source(path, config, read, entries=content["entries"]))


def require_tokens(source: Source, tokenizer: TextTokenizer, name: str) -> None:
    """Raises UserError unless a model, which the setting ``name`` names, was trained on what ``tokenizer`` gives.

    Told by what both make of a text: how a tokenizer is stored, and with which end tokens, makes no difference.
    """
    own = source.tokenizer
    if own is not None and own.encode(PROBE) != tokenizer.encode(PROBE):
        raise UserError(
            f"{name} {source.path} was trained with another tokenizer than this run's data: set data.tokenizer to "
            f"TokenizerFile(path='{source.path}{'/tokenizer' if source.experiment else ''}')"
        )


def describe(source: Source, params: Params) -> dict[str, Any]:
    """The content of the ``model.json`` of a converted model."""
    dtypes = {path: np.dtype(array.dtype).name for path, array in flat(params).items()}
    return {"config": configs.to_data(source.config), "dtypes": dtypes, "entries": dict(source.entries)}


KINDS: dict[str, Callable[[Path], Source]] = {
    "experiment.json": _run,
    MODEL: _converted,
    "config.json": _huggingface,
}
WHAT = {"experiment.json": "a run", MODEL: "made by lmx convert", "config.json": "a Hugging Face model"}


def _with_texts(source: Source) -> Source:
    """The source with what lies beside it for text: a tokenizer, a chat template, defaults."""
    tokenizer = None if tokenizer_file(source.path) is None else load_tokenizer(source.path)
    tokens = {} if tokenizer is None else tokenizer.special_tokens
    return replace(
        source,
        tokenizer=tokenizer,
        defaults=read_defaults(source.path, source.entries),
        template=find_template(source.path, tokens),
    )


def _placed(config: ModelConfig, shapes: Params, sharding: Sharding | None) -> Params:
    """The shapes, each with its place on the mesh."""
    if sharding is None:
        return shapes
    axes = param_axes(config.spec())
    sharding.check_divides(axes, shapes)
    return cast(Params, jax.tree.map(lambda s, own: s.update(sharding=sharding.named(own)), shapes, axes))


def _cast(params: Any, dtype: Any) -> Params:
    return cast(Params, params if dtype is None else cast_floats(params, dtype))


def _with_dtypes(shapes: Params, dtypes: Mapping[str, str]) -> Params:
    def one(keys: Any, shape: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        path = jax.tree_util.keystr(keys, simple=True, separator="/")
        return shape.update(dtype=np.dtype(dtypes.get(path, shape.dtype)))

    return cast(Params, jax.tree.map_with_path(one, shapes))


def _no_step(path: Path, step: int | None) -> None:
    if step is not None:
        raise UserError(f"{path} is not a run, so it has no step {step}; leave the step out")
