"""What a model writes for held-out sources, against their targets: BLEU and chrF, ROUGE and exact match."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lmx.data.config import DataConfig
from lmx.data.prepare import Prepared, prepare
from lmx.decode.generate import Completion
from lmx.decode.loaded import Model
from lmx.errors import UserError
from lmx.eval.metrics.measure import Measure
from lmx.eval.metrics.text import Measured, References, bleu, chrf, exact, rouge
from lmx.eval.perplexity import require_tokens_fit
from lmx.eval.run import Result
from lmx.experiment import Experiment
from lmx.sharding.processes import agreed, is_first

ROWS = 32
"""Sources that are read at once."""

Write = Callable[[Sequence[str], int, int], Sequence[Completion]]
"""(sources, most tokens to write, the seed of the first) -> what the model writes, the likeliest token each time."""


@dataclass(frozen=True)
class HeldOutPairs:
    """Held-out pairs, the shortest source first, and the most tokens that are written for one."""

    sources: tuple[str, ...]
    targets: tuple[str, ...]
    tokens: int
    copied: Measure
    """The BLEU that the sources themselves reach."""

    @classmethod
    def of(cls, prepared: Prepared, experiment: Experiment, wanted: int) -> "HeldOutPairs":
        """``wanted`` pairs, evenly from all those whose source and target fit a row.

        Raises:
          UserError: the model does not write, the documents are no pairs, none fits, or sacrebleu is not installed.
        """
        spec, length = experiment.model.spec(), experiment.train.length
        tokens = getattr(experiment.objective, "target_length", 0) or length
        if spec.head is None or not experiment.objective.reads_prefix or (spec.encoder is None and tokens >= length):
            raise UserError(
                f"eval.written is {wanted}, but {type(experiment.objective).__name__} with this "
                f"{experiment.model.family} does not write targets for sources: it takes an objective for pairs, and "
                "of a decoder a target_length below train.length; or set eval.written to 0"
            )
        room = length - 1 if spec.encoder else length - tokens
        pairs = [pair for source in prepared.sources for pair in _fitting(source, room, tokens)]
        if not pairs:
            raise UserError(
                f"eval.written is {wanted}, but there is no held-out pair with at most {room} tokens of source and "
                f"{tokens} of target: raise data.held_out, or set eval.written to 0"
            )
        chosen = [pairs[i] for i in np.linspace(0, len(pairs) - 1, min(wanted, len(pairs))).astype(int)]
        read = [
            (size, *(next(store.texts([index])) for store in (documents, documents.targets)))
            for size, documents, index in chosen
        ]
        _, sources, targets = zip(*sorted(read), strict=True)
        copied, _ = bleu(sources, [[target] for target in targets])
        return cls(sources, targets, min(tokens, spec.context - 1), copied["bleu"])

    @property
    def references(self) -> list[list[str]]:
        """For each source, the one text that it may become."""
        return [[target] for target in self.targets]

    def texts(self, write: Write) -> list[str]:
        """What is written for the sources."""
        texts: list[str] = []
        for start in range(0, len(self.sources), ROWS):
            some = self.sources[start : start + ROWS]
            texts += [done.text.strip() for done in write(some, self.tokens, start)]
        return texts

    def scored(self, texts: Sequence[str]) -> Measured:
        """``bleu``, ``chrf`` and ``copy_bleu`` (that of the sources themselves); and sacrebleu's signatures."""
        (found, told), (more, also) = bleu(texts, self.references), chrf(texts, self.references)
        return found | more | {"copy_bleu": self.copied}, told | also


def written(model: Model, data: DataConfig, wanted: int) -> Result:
    """What the model of a run reaches on ``wanted`` held-out pairs of ``data``, prepared if need be.

    Raises:
      UserError: a model of no run, or see :meth:`HeldOutPairs.of`.
    """
    if model.experiment is None:
        raise UserError("--written takes a run, whose objective says what is written; for other models use --tasks")
    with agreed():
        prepared = prepare(data, progress=is_first())
    require_tokens_fit(prepared.tokenizer, model.spec)
    pairs = HeldOutPairs.of(prepared, model.experiment, wanted)

    def write(sources: Sequence[str], tokens: int, first: int) -> list[Completion]:
        seeds = range(first, first + len(sources))
        return model.generate(sources, max_new_tokens=tokens, temperature=0, repetition_penalty=1.0, seed=seeds)

    texts = pairs.texts(write)
    parts = [pairs.scored(texts), exact(texts, pairs.references), _rouge(texts, pairs.references)]
    measures = {name: measure for found, _ in parts for name, measure in found.items()}
    notes = {name: note for _, told in parts for name, note in told.items()}
    return Result(len(pairs.sources), measures, {"written": wanted, "max_new_tokens": pairs.tokens}, notes)


def _rouge(texts: Sequence[str], references: References) -> Measured:
    """ROUGE, or a note that it is not there: its package is needed for nothing else."""
    try:
        return rouge(texts, references)
    except UserError as error:
        return {}, {"left out": str(error)}


def _fitting(source: Any, room: int, tokens: int) -> list[tuple[int, Any, int]]:
    """The held-out pairs of a source that fit, as the tokens of their source, the documents, and the index in them."""
    if source.targets is None or source.documents.targets is None:
        return []
    sizes, targets = (np.asarray(store.lengths) for store in (source.tokens, source.targets))
    held_out = source.chosen("held_out")
    fits = held_out[(sizes[held_out] <= room) & (targets[held_out] < tokens)]
    return [(int(sizes[i]), source.documents, int(i)) for i in fits]
