"""Evaluation, early stopping and samples during training."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import jax.numpy as jnp

from lmx.data.loader import Loader
from lmx.data.prepare import Prepared
from lmx.data.rows import held_out_rows, spread
from lmx.decode.generate import Generator
from lmx.decode.places import Places, unstacker
from lmx.decode.sampling import Sampling
from lmx.eval.perplexity import Score, jit_sums, score
from lmx.experiment import EvalConfig, Experiment, RunDir
from lmx.nn.module import Params
from lmx.objectives.objective import Frozen
from lmx.sharding.processes import is_first
from lmx.sharding.rules import Sharding
from lmx.train.metrics import Values, append_json
from lmx.train.step import BATCH


class HeldOut:
    """The held-out rows and the compiled sums over them."""

    def __init__(self, experiment: Experiment, sharding: Sharding, prepared: Prepared):
        self._experiment, self._sharding = experiment, sharding
        rows = held_out_rows(prepared, length=experiment.layout(prepared.tokenizer))
        self._rows: Any = spread(rows, experiment.eval.rows)
        self._sums = jit_sums(experiment, sharding)
        self._token_bytes = jnp.asarray(prepared.tokenizer.token_bytes())

    def score(self, params: Params, frozen: Mapping[str, Frozen]) -> Score:
        """The model's score on all of them; ``frozen`` are the models that the objective reads."""
        place = self._sharding.named(BATCH)
        with Loader(self._rows, batch=self._experiment.train.batch, sharding=place) as batches:
            return score(self._sums, params, batches, self._token_bytes, frozen)


def eval_values(result: Score) -> Values:
    """A score under the names of metrics.jsonl."""
    values = {name: value for name, value in asdict(result).items() if name != "bytes" and value is not None}
    return {f"eval_{name}": float(value) for name, value in values.items()}


@dataclass
class EarlyStopping:
    """Counts evaluations without improvement; part of every checkpoint: a resumed run stops where it would have."""

    config: EvalConfig
    best: float | None = None
    worse: int = 0
    stopped: bool = False

    def stops(self, loss: float) -> bool:
        """Takes an evaluation's loss; whether training should stop."""
        if self.best is None or loss < self.best - self.config.min_improvement:
            self.best, self.worse = loss, 0
        else:
            self.worse += 1
        self.stopped = 0 < self.config.patience <= self.worse
        return self.stopped

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"best": self.best, "worse": self.worse, "stopped": self.stopped}


class Sampler:
    """Continues the experiment's prompts and keeps the texts."""

    def __init__(self, experiment: Experiment, run: RunDir, prepared: Prepared, sharding: Sharding):
        self.config, self._run, self._tokenizer = experiment.sample, run, prepared.tokenizer
        self._spec, self._places = experiment.model.spec(), Places.of(sharding) if sharding.mesh.size > 1 else None
        self._prefix = experiment.objective.reads_prefix and self._spec.encoder is None
        self._ready: Callable[[Params], Params] | None = None
        if self.config.prompts:  # a mesh that does not divide unrolled layers is refused before training
            self._ready = unstacker(self._spec, jnp.dtype(experiment.train.compute), self._places)

    def write(self, step: int, params: Params) -> list[tuple[str, str]]:
        """Samples one text for each prompt, appends them to samples.jsonl and returns (prompt, text) pairs."""
        if self._ready is None:
            return []
        ready = self._ready(params)
        generator = Generator(self._spec, ready, self._tokenizer, prefix=self._prefix, places=self._places)
        texts = generator.generate(
            self.config.prompts,
            max_new_tokens=self.config.tokens,
            sampling=Sampling(temperature=self.config.temperature),
            seeds=range(len(self.config.prompts)),
        )
        pairs = [(p, t.text) for p, t in zip(self.config.prompts, texts, strict=True)]
        for prompt, text in pairs if is_first() else ():
            append_json(self._run.samples, {"step": step, "prompt": prompt, "text": text})
        return pairs
