"""Experiment: the whole of a run, composed of the parts' own configurations. A recipe is a function returning one."""

import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal

from lmx import config
from lmx.adapters.adapter import Adapter, Whole
from lmx.checkpoint.config import CheckpointConfig
from lmx.config import BELOW_ONE, COUNT, NOT_NEGATIVE
from lmx.data.config import DataConfig, TrainedBpe
from lmx.data.layout import Layout
from lmx.data.tokenizer import TextTokenizer
from lmx.errors import UserError
from lmx.models.config import ModelConfig
from lmx.models.families.gpt2 import Gpt2
from lmx.models.flops import train_flops_per_token
from lmx.models.model import param_axes
from lmx.models.schedules import PipelineConfig
from lmx.models.specs import ModelSpec, Remat, noisy
from lmx.objectives import catalogue as catalogue  # so that a run's file may name any objective
from lmx.objectives.next_token import NextToken
from lmx.objectives.objective import Objective
from lmx.objectives.vocabulary import Vocabulary
from lmx.optim.names import names
from lmx.optim.optimizer import AdamW, Optimizer
from lmx.optim.schedule import Schedule
from lmx.sharding.layouts import find_layout
from lmx.sharding.mesh import MeshConfig
from lmx.sharding.rules import Rules
from lmx.sharding.storage import storage

Compute = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class TrainConfig:
    """The loop: how long, how much at once, and what is kept or averaged."""

    steps: Annotated[int, COUNT] = 1000
    """Optimizer steps."""
    batch: Annotated[int, COUNT] = 8
    """Sequences in a step, over all devices."""
    length: Annotated[int, COUNT] = 512
    """Tokens in a sequence; at most model.context."""
    accumulate: Annotated[int, COUNT] = 1
    """Microbatches that a step is cut into, to save memory."""
    seed: int = 0
    """Seeds the parameters, the data order and dropout."""
    compute: Compute = "float32"
    """Dtype of the matrix products; the parameters stay float32."""
    remat: Remat = "dots"
    """What the forward pass keeps: everything (none), results of matrix products (dots), block inputs (full)."""
    ema: Annotated[float, BELOW_ONE] = 0.0
    """Decay of an exponential moving average of the parameters, used for evaluation; 0 for none."""
    stochastic_depth: Annotated[float, BELOW_ONE] = 0.0
    """Probability that a sublayer of the last layer is skipped in a row of the batch; less, linearly, before it."""
    token_dropout: Annotated[float, BELOW_ONE] = 0.0
    """Share of the input's tokens whose embedding is 0 in training."""
    token_swap: Annotated[float, BELOW_ONE] = 0.0
    """Share of the input's tokens that another token replaces in training."""
    log_every: Annotated[int, COUNT] = 10
    """Steps between lines of metrics.jsonl."""
    max_skipped: Annotated[int, COUNT] = 10
    """Steps in a row with non-finite gradients (each is skipped) after which the run stops."""


@dataclass(frozen=True)
class EvalConfig:
    """Evaluation on the held-out documents during training."""

    every: Annotated[int, NOT_NEGATIVE] = 200
    """Steps between evaluations; there is always one at the end. 0: only that one."""
    rows: Annotated[int, NOT_NEGATIVE] = 0
    """Held-out rows to use, evenly from all over them; 0 for all."""
    written: Annotated[int, NOT_NEGATIVE] = 0
    """Held-out pairs whose targets the model writes, to be scored with BLEU and chrF; 0 for none."""
    patience: Annotated[int, NOT_NEGATIVE] = 0
    """Evaluations without a better loss after which training stops early; 0 never stops it."""
    min_improvement: Annotated[float, NOT_NEGATIVE] = 0.0
    """Nats by which a loss must be lower to count as better."""
    xz: bool = False
    """At the end, also compress the held-out text with xz -9, alone and after the training text, to compare with."""

    def check(self) -> None:
        """Raises UserError for a patience that has nothing to wait for."""
        if self.patience and not self.every:
            raise UserError(
                f"eval.patience is {self.patience}, but eval.every is 0: set it to the steps between evaluations, or "
                "eval.patience to 0"
            )


@dataclass(frozen=True)
class SampleConfig:
    """Text written by the model during training, kept in samples.jsonl."""

    every: Annotated[int, NOT_NEGATIVE] = 0
    """Steps between samples; there are always some at the end. 0: only those."""
    prompts: tuple[str, ...] = ()
    """What the model continues; none for no samples."""
    tokens: Annotated[int, COUNT] = 64
    """Tokens to write."""
    temperature: Annotated[float, NOT_NEGATIVE] = 0.8
    """0 takes the likeliest token."""

    def check(self, model: ModelConfig) -> None:
        """Raises UserError if such a model cannot continue prompts by so many tokens."""
        spec = model.spec()
        if self.prompts and (spec.head is None or (spec.encoder is None and spec.stack.looks_ahead)):
            raise UserError(
                f"sample.prompts is {self.prompts!r}, but a {model.family} with model.task {model.task!r} continues no "
                "text; leave it empty"
            )
        if self.prompts and self.tokens >= model.context:
            raise UserError(f"sample.tokens is {self.tokens}, expected less than model.context {model.context}")


@dataclass(frozen=True)
class Experiment:
    """A complete run."""

    model: ModelConfig = field(default_factory=Gpt2)
    data: DataConfig = field(default_factory=DataConfig)
    objective: Objective = field(default_factory=NextToken)
    optimizer: Optimizer = field(default_factory=AdamW)
    adapter: Adapter = field(default_factory=Whole)
    schedule: Schedule = field(default_factory=Schedule)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    rules: Rules = field(default_factory=Rules)
    pipeline: PipelineConfig = field(default_factory=PipelineConfig)
    init_from: str = ""
    """A run directory, a Hugging Face directory or a converted model whose weights are the start; the optimizer and the
    step are fresh."""

    def check(self) -> None:
        """Raises UserError for numbers that do not fit each other, before anything is read or compiled."""
        config.check_numbers(self)
        train = self.train
        if train.length > self.model.context:
            raise UserError(
                f"train.length {train.length} is longer than model.context {self.model.context}; "
                f"lower the one or raise the other"
            )
        if train.batch % train.accumulate:
            raise UserError(f"train.batch {train.batch} is not divisible by train.accumulate {train.accumulate}")
        self.eval.check()
        if self.checkpoint.keep_best and not self.eval.every:
            raise UserError(
                "checkpoint.keep_best is set, but eval.every is 0: set it to the steps between evaluations, or "
                "checkpoint.keep_best to False"
            )
        self.schedule.check(train.steps)
        self.model.spec()
        self.sample.check(self.model)
        self._check_trained()
        self.objective.check(self.model, train.length)

    def _check_trained(self) -> None:
        axes = param_axes(self.model.spec())
        self.adapter.check(axes)
        if self.adapter.alone and not self.init_from:
            raise UserError(
                f"adapter {type(self.adapter).__name__} is trained beside a model, but init_from names none; set "
                "--init-from to a run or a Hugging Face directory"
            )
        own = [name for name in names(self.adapter.axes(axes)) if self.adapter.trains(name)]
        self.optimizer.check(own)
        if not any(self.trains(name) for name in own):
            raise UserError("optimizer.frozen freezes every parameter; leave some to be trained")

    def trains(self, name: str) -> bool:
        """Whether a step changes the parameter of this name."""
        return self.adapter.trains(name) and self.optimizer.trains(name)

    def spec(self) -> ModelSpec:
        """The model's shape in training, with what is drawn at random there."""
        train = self.train
        return noisy(self.model.spec(), depth=train.stochastic_depth, drop=train.token_dropout, swap=train.token_swap)

    def laid_out(self, layout: str) -> "Experiment":
        """The same with the mesh and the rules of a layout of :mod:`lmx.sharding.layouts`, as ``fsdp``.

        Raises:
          UserError: there is no such layout.
        """
        found = find_layout(layout)
        return replace(self, mesh=found.mesh, rules=found.rules)

    @property
    def corpus(self) -> DataConfig:
        """The data, with a trained tokenizer that has the special tokens of the objective."""
        wanted, needed = self.data.tokenizer, self.objective.special_tokens
        if not isinstance(wanted, TrainedBpe) or not needed:
            return self.data
        specials = tuple(dict.fromkeys((*wanted.special_tokens, *needed)))
        return replace(self.data, tokenizer=replace(wanted, special_tokens=specials))

    def check_tokenizer(self, tokenizer: TextTokenizer) -> None:
        """Raises UserError if the model has fewer tokens than the tokenizer, or that lacks what the objective needs."""
        if self.model.vocab < tokenizer.vocab_size:
            raise UserError(
                f"model.vocab {self.model.vocab} is smaller than the tokenizer's {tokenizer.vocab_size} tokens; set "
                f"--model.vocab {tokenizer.vocab_size} or more"
            )
        self.layout(tokenizer)

    def layout(self, tokenizer: TextTokenizer) -> Layout:
        """The rows that it trains on and is evaluated on.

        Raises:
          UserError: the tokenizer lacks special tokens that the objective needs.
        """
        vocabulary = Vocabulary.of(tokenizer, self.objective.special_tokens)
        return self.objective.layout(vocabulary, self.model.spec(), self.train.length)

    def train_flops_per_token(self, layout: Layout) -> float:
        """FLOPs to train on one of the ``train.length`` positions of a row in its layout, which says how many of them
        are predicted and how long a decoder's own row is."""
        sizes = {name: len(array) for name, array in layout.empty().items()}
        predicted = sizes.get("targets")
        return train_flops_per_token(self.model.spec(), self.train.length, sizes.get("decoder_tokens"), predicted)


HARMLESS = (
    *("train.log_every", "train.max_skipped", "train.remat"),
    *("eval", "sample", "data.cache_dir", "mesh", "rules", "pipeline"),
    *("checkpoint.every", "checkpoint.keep", "checkpoint.keep_every", "checkpoint.asynchronous"),
    *("checkpoint.local_directory", "checkpoint.local_every"),
)
"""Parts that a resumed run may change: what is learned from which data does not depend on them, but for rounding."""


@dataclass(frozen=True)
class RunDir:
    """Where a run keeps what: its configuration, tokenizer, checkpoints, metrics, samples and report."""

    path: Path

    @property
    def experiment(self) -> Path:
        """The resolved configuration."""
        return self.path / "experiment.json"

    @property
    def tokenizer(self) -> Path:
        """The directory of the tokenizer, a copy of the run's own."""
        return self.path / "tokenizer"

    @property
    def checkpoints(self) -> Path:
        """Where the checkpoints lie unless the configuration says otherwise."""
        return self.path / "checkpoints"

    @property
    def identity(self) -> Path:
        """The name under which nodes keep local checkpoints of this run, and of no other."""
        return self.path / "id"

    def local_checkpoints_of(self, experiment: Experiment) -> Path | None:
        """Where each node has this run's local checkpoints, if it may have some."""
        directory = experiment.checkpoint.local_directory
        return Path(directory) / self.identity.read_text() if directory and self.identity.exists() else None

    def checkpoints_of(self, experiment: Experiment) -> str:
        """Where the run's checkpoints lie: a path, or an object store's address.

        Raises:
          UserError: see :func:`lmx.sharding.storage.storage`.
        """
        return os.fspath(storage(experiment.checkpoint.directory or self.checkpoints))

    @property
    def base(self) -> Path:
        """Of an adapter: which model it belongs to."""
        return self.path / "base.json"

    @property
    def metrics(self) -> Path:
        """One JSON object a logged step."""
        return self.path / "metrics.jsonl"

    @property
    def samples(self) -> Path:
        """One JSON object a sampled text: step, prompt, text."""
        return self.path / "samples.jsonl"

    @property
    def hosts(self) -> Path:
        """One JSON object a log interval of several processes: who had how much time of its own."""
        return self.path / "hosts.jsonl"

    @property
    def fingerprint(self) -> Path:
        """What bitwise repetition depends on: versions, devices, cores, flags, data."""
        return self.path / "fingerprint.json"

    @property
    def data(self) -> Path:
        """Statistics of the prepared data."""
        return self.path / "data.json"

    @property
    def summary(self) -> Path:
        """The results of a finished run."""
        return self.path / "summary.json"

    def load_experiment(self) -> Experiment:
        """The run's experiment.

        Raises:
          UserError: this is not a run directory, or its configuration was damaged.
        """
        if not self.experiment.exists():
            raise UserError(f"{self.path} is not a run directory: it has no {self.experiment.name}")
        return config.load(Experiment, self.experiment)
