"""Evaluation, early stopping and samples during training."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import jax.numpy as jnp

from lmx.data.loader import Loader
from lmx.data.prepare import Prepared
from lmx.data.rows import held_out_rows, spread
from lmx.decode.generate import Completion, Generator
from lmx.decode.places import Places, unstacker
from lmx.decode.sampling import Sampling
from lmx.errors import UserError
from lmx.eval.score import Score, jit_sums, on_host, score
from lmx.eval.written import HeldOutPairs
from lmx.experiment import EvalConfig, Experiment, RunDir
from lmx.nn.module import Params
from lmx.objectives.objective import Frozen
from lmx.sharding.processes import is_first, share
from lmx.sharding.rules import Sharding
from lmx.train.metrics import Values, append_json, steps_of
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
            return score(on_host(self._sums, params, batches, self._token_bytes, frozen))


def eval_values(result: Score) -> Values:
    """A score under the names of metrics.jsonl."""
    values = {name: value for name, value in asdict(result).items() if name != "bytes" and value is not None}
    return {f"eval_{name}": float(value) for name, value in values.items()}


@dataclass
class EarlyStopping:
    """Counts evaluations without improvement; part of every checkpoint: a resumed run stops where it would have."""

    config: EvalConfig
    best: float | None = None
    best_step: int = 0
    worse: int = 0
    stopped: bool = False

    def stops(self, loss: float, step: int) -> bool:
        """Takes the loss of the evaluation after ``step`` steps; one that is not a number is never better. Whether
        training should stop."""
        best = math.inf if self.best is None else self.best
        if loss < best - self.config.min_improvement:
            self.best, self.best_step, self.worse = loss, step, 0
        else:
            self.worse += 1
        self.stopped = 0 < self.config.patience <= self.worse
        return self.stopped

    def __str__(self) -> str:
        better = f"{self.best:.4f} after step {self.best_step}" if self.best_step else "none so far"
        return f"{self.worse} evaluations in a row had no lower loss than the best ({better})"

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"best": self.best, "best_step": self.best_step, "worse": self.worse, "stopped": self.stopped}


class Writer:
    """Makes the model that is trained ready to write."""

    def __init__(self, experiment: Experiment, prepared: Prepared, sharding: Sharding):
        self._spec, self._tokenizer = experiment.model.spec(), prepared.tokenizer
        self._places = Places.of(sharding) if sharding.mesh.size > 1 else None
        self._prefix = experiment.objective.reads_prefix and self._spec.encoder is None
        self._encode = self._ended if experiment.objective.ends_source else None
        # A mesh that does not divide unrolled layers is refused here, before training.
        self._ready = unstacker(self._spec, jnp.dtype(experiment.train.compute), self._places)

    def __call__(self, params: Params) -> Generator:
        """What writes with these parameters."""
        return self._generator(self._ready(params))

    def check(self, prompts: Sequence[str], tokens: int) -> None:
        """Raises UserError for a prompt that does not fit the context with so many new tokens."""
        generator = self._generator({})
        for index, prompt in enumerate(prompts):
            generator.encode_prompt(prompt, index, tokens)

    def _generator(self, params: Params) -> Generator:
        return Generator(
            self._spec,
            params,
            self._tokenizer,
            encode=self._encode,
            prefix=self._prefix,
            places=self._places,
        )

    def _ended(self, text: str) -> list[int]:
        return [*self._tokenizer.encode(text), self._tokenizer.end_id]


class Translator:
    """Writes the targets of held-out pairs, where ``eval.written`` asks for it."""

    def __init__(self, experiment: Experiment, prepared: Prepared, sharding: Sharding):
        self._pairs: HeldOutPairs | None = None
        if experiment.eval.written:
            self._pairs = HeldOutPairs.of(prepared, experiment, experiment.eval.written)
            self._writer = Writer(experiment, prepared, sharding)

    def score(self, params: Params) -> Values:
        """``eval_bleu``, ``eval_chrf`` and ``eval_copy_bleu`` of what the model writes; nothing if none was wanted."""
        if self._pairs is None:
            return {}
        generator, likeliest = self._writer(params), Sampling(temperature=0)

        def write(sources: Sequence[str], tokens: int, first: int) -> list[Completion]:
            seeds = range(first, first + len(sources))
            return generator.generate(sources, max_new_tokens=tokens, sampling=likeliest, seeds=seeds)

        measures, _ = self._pairs.scored(self._pairs.texts(write))
        return {f"eval_{name}": measure.value for name, measure in measures.items()}


class Sampler:
    """Continues the experiment's prompts and keeps the texts. Raises UserError for a prompt that does not fit."""

    def __init__(self, experiment: Experiment, run: RunDir, prepared: Prepared, sharding: Sharding):
        self.config, self._run = experiment.sample, run
        self._writer = Writer(experiment, prepared, sharding) if self.config.prompts else None
        if self._writer:
            try:
                self._writer.check(self.config.prompts, self.config.tokens)
            except UserError as error:
                raise UserError(f"sample.prompts: {error}") from error

    def write(self, step: int, params: Params) -> None:
        """Samples one text for each prompt and appends them to samples.jsonl."""
        if self._writer is None:
            return
        texts = self._writer(params).generate(
            self.config.prompts,
            max_new_tokens=self.config.tokens,
            sampling=Sampling(temperature=self.config.temperature),
            seeds=range(len(self.config.prompts)),
        )
        if is_first():
            pairs = zip(self.config.prompts, texts, strict=True)
            append_json(self._run.samples, *({"step": step, "prompt": p, "text": t.text} for p, t in pairs))

    def wrote(self, step: int) -> bool:
        """Whether the texts of this step are kept, or none were wanted; the same on every process."""
        kept = is_first() and step in steps_of(self._run.samples)
        return self._writer is None or bool(share("yes" if kept else "")[0])
