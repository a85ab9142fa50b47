"""A tag for each word (Devlin et al. 2018, 5.3): named entities, parts of speech."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from lmx.data.framing import Framed, Frames
from lmx.data.layout import Piece, Row
from lmx.kernels.cross_entropy import LossSums
from lmx.models.config_map import Task
from lmx.objectives.classification import class_sums
from lmx.objectives.labelled import ExampleRows, Labelled, Longer, check_classes
from lmx.objectives.objective import Batch


@dataclass(frozen=True)
class TokenClassification(Labelled):
    """Cross-entropy of each word's tag at its first token; the word's other tokens have none."""

    longer: Longer = "split"
    """What becomes of examples that take more than a row: several of them (split), their ends are cut, or they are left
    out; all of it is counted."""

    task: ClassVar[Task] = "token_classification"
    whole_text: ClassVar[bool] = False
    whole_rows: ClassVar[bool] = False

    def rows(self, length: int, frames: Frames, typed: bool, start: int | None, outputs: int) -> ExampleRows:
        """Rows with tags."""
        return TagRows(length, frames, typed, start, outputs, self.longer)

    def scored(self, batch: Batch) -> tuple[jax.Array, jax.Array]:
        """The tags, int32 [batch, length], and float32 weights, 0 where no word begins."""
        return jnp.maximum(batch["labels"] - 1, 0), (batch["labels"] > 0).astype(jnp.float32)

    def score(self, scores: jax.Array, batch: Batch) -> tuple[LossSums, dict[str, jax.Array]]:
        """See :class:`Labelled`."""
        return class_sums(scores, *self.scored(batch))


@dataclass(frozen=True)
class TagRows(ExampleRows):
    """``labels``, int32 [length]: 1 + the tag where a word begins, 0 elsewhere."""

    @property
    def kinds(self) -> tuple[str, ...]:
        """Words with tags."""
        return ("tags",)

    def check_examples(self, name: str, classes: Sequence[str], counts: np.ndarray) -> None:
        """As many tags as outputs."""
        check_classes(name, "tags", classes, self.outputs)

    def label_arrays(self) -> Row:
        """See the class."""
        return {"labels": np.zeros(self.length, np.int32)}

    def label(self, row: Row, segment: int, at: int, piece: Piece, framed: Framed) -> None:
        """See the class."""
        assert piece.labels is not None, "the documents have no labels"
        extra = self.frames.single.extra
        count = min(len(piece.tokens), len(framed.tokens) - extra)
        first = at + framed.starts[0]
        row["labels"][first : first + count] = piece.labels[piece.start : piece.start + count]

    def invented_labels(self, rng: np.random.Generator, count: int) -> np.ndarray | None:
        """Some tags, some places without."""
        return rng.integers(0, self.outputs + 1, count, np.int32)
