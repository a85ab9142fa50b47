"""What the objectives of labelled examples share: rows of whole examples, and losses by a task head.

Several examples share a row, and no position sees another segment's. A head that answers for a whole text does so for
each segment: it is given what it pools of a text (its first token, its last, or the mean) segment by segment.
"""

import abc
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np

from lmx.data.framing import Framed, Frames
from lmx.data.layout import Layout, Other, Piece, Row, Whole
from lmx.errors import UserError
from lmx.kernels.cross_entropy import LossSums
from lmx.models.config import ModelConfig
from lmx.models.config_map import Task
from lmx.models.lockstep import score_layers, with_told
from lmx.models.model import Inputs, apply, encode, task
from lmx.models.specs import ModelSpec, Remat
from lmx.nn.head import Pool, SequenceHead, TaskHead
from lmx.nn.module import Params
from lmx.objectives.objective import Batch, Frozen, Objective, Reading, Targets
from lmx.objectives.vocabulary import Vocabulary

EIGHT = 8
"""An example takes at least so many positions, so that a row of n holds at most n / 8; rounded up to eights, these
places split on every mesh that splits the row."""
Longer = Literal["truncate", "drop", "split"]


@dataclass(frozen=True)
class Labelled(Objective):
    """Base class. ``task`` is the model's that it needs, ``whole_text`` whether its head answers for a text, and
    ``whole_rows`` whether an example's loss looks at more than one of its positions."""

    targets: ClassVar[Targets] = "classes"
    framed: ClassVar[bool] = True
    task: ClassVar[Task]
    whole_text: ClassVar[bool] = True
    whole_rows: ClassVar[bool] = True

    def check(self, model: ModelConfig, length: int) -> None:
        """A model with the head fits."""
        spec, name = model.spec(), type(self).__name__
        if model.task != self.task:
            raise UserError(
                f"objective {name} needs a model with a head for it, but model.task is {model.task!r}: set it to "
                f"{self.task!r}"
            )
        if not spec.tasks or isinstance(spec.tasks[0], SequenceHead) != self.whole_text:
            raise UserError(f"objective {name} needs a head for {self.task}, which a {model.family} does not have")

    def layout(self, vocabulary: Vocabulary, spec: ModelSpec, length: int) -> Layout:
        """Rows of whole examples."""
        frames = vocabulary.frames(before=spec.encoder is None)
        start = None if spec.encoder is None else spec.encoder.decoder_start
        typed = (spec.encoder or spec).embedding.types > 1
        return self.rows(length, frames, typed, start, head_of(spec).outputs)

    @abc.abstractmethod
    def rows(self, length: int, frames: Frames, typed: bool, start: int | None, outputs: int) -> "ExampleRows":
        """The layout, of these and its own settings."""

    @abc.abstractmethod
    def score(self, scores: jax.Array, batch: Batch) -> tuple[LossSums, dict[str, jax.Array]]:
        """The sums and the measures, given the head's float32 scores [batch, places or length, outputs]."""

    def loss(
        self, spec: ModelSpec, params: Params, batch: Batch, *, key: jax.Array | None = None, remat: Remat = "none"
    ) -> LossSums:
        """The sums over the examples, or over what is labelled in them."""
        return self._sums(spec, params, batch, key, remat, told=False)

    def measured(
        self, models: Mapping[str, Frozen], spec: ModelSpec, params: Params, batch: Batch
    ) -> tuple[LossSums, dict[str, jax.Array]]:
        """See :class:`Objective`."""
        sums = self._sums(spec, params, batch, None, "full", told=True)
        return sums, dict(sums.aux["measures"])

    def _sums(
        self, spec: ModelSpec, params: Params, batch: Batch, key: jax.Array | None, remat: Remat, told: bool
    ) -> LossSums:
        one, two, three = (None,) * 3 if key is None else jax.random.split(key, 3)
        score = functools.partial(self._score, spec, three, told)
        inputs, source = self._reading(spec, batch)
        run = functools.partial(score_layers, spec, params, inputs, batch, score, whole_rows=self.whole_rows)
        if source is None:
            return run(key=one, remat=remat)
        memory, aux = encode(spec, params, source, key=two, remat=remat)
        return with_told(run(memory=memory, key=one, remat=remat), aux)

    def _reading(self, spec: ModelSpec, batch: Batch) -> Reading:
        read = Inputs(batch["tokens"], batch["positions"], batch["segment_ids"], batch.get("types"))
        if spec.encoder is None:
            return Reading(read)
        return Reading(Inputs(batch["decoder_tokens"], batch["positions"], batch["segment_ids"]), read)

    def _score(
        self, spec: ModelSpec, key: jax.Array | None, told: bool, params: Params, hidden: jax.Array, batch: Batch
    ) -> LossSums:
        sums, measures = self.score(_scores(spec, key, params, hidden, batch), batch)
        return sums if not told else LossSums(sums.total, sums.nll, sums.weight, sums.correct, {"measures": measures})

    def scores(self, spec: ModelSpec, params: Params, batch: Batch) -> jax.Array:
        """What a model's head says of a batch, float32 [batch, places or length, outputs]."""
        inputs, source = self._reading(spec, batch)
        memory = None if source is None else encode(spec, params, source)[0]
        return _scores(spec, None, params, apply(spec, params, inputs, memory=memory).hidden, batch)


def _scores(spec: ModelSpec, key: jax.Array | None, params: Params, hidden: jax.Array, batch: Batch) -> jax.Array:
    """The head's scores [batch, places or length, outputs] of hidden states [batch, length, embed]."""
    head, segments = head_of(spec), batch["segment_ids"]
    if not isinstance(head, SequenceHead):
        return task(spec, params, head.name, hidden, Inputs(segments, batch["positions"], segments), key)
    # Each segment's pooled state is a text of one token to the head.
    states = segment_states(head.pool, hidden, segments, segment_count(segments.shape[1]))
    single = states.reshape(-1, 1, states.shape[-1])
    return task(spec, params, head.name, single, _ones(single), key).reshape(*states.shape[:2], -1)


def _ones(states: jax.Array) -> Inputs:
    return Inputs.whole(jnp.zeros(states.shape[:2], jnp.int32))


def head_of(spec: ModelSpec) -> TaskHead:
    """The head of the model's task."""
    return spec.tasks[0]


def segment_count(length: int) -> int:
    """Places for examples in a row of ``length``."""
    return EIGHT * max(1, -(-length // EIGHT**2))


def segment_states(pool: Pool, hidden: jax.Array, segments: jax.Array, count: int) -> jax.Array:
    """What stands for each segment, [batch, count, embed] of hidden states [batch, length, embed] and int32 segments
    [batch, length]; it means nothing where there is no such segment."""
    member = segments[:, None, :] == jnp.arange(1, count + 1)[None, :, None]
    if pool == "mean":
        weights = member.astype(jnp.float32)
        weights /= jnp.maximum(weights.sum(-1, keepdims=True), 1)
        return jnp.einsum("bsl,ble->bse", weights, hidden.astype(jnp.float32)).astype(hidden.dtype)
    length = segments.shape[1]
    at = member.argmax(-1) if pool == "first" else length - 1 - member[..., ::-1].argmax(-1)
    return jnp.take_along_axis(hidden, at[..., None], axis=1)


def class_measures(guesses: jax.Array, right: jax.Array, weights: jax.Array, classes: int) -> dict[str, jax.Array]:
    """``hits``, ``guesses`` and ``cases`` of each class, float32 [classes], of int32 numbers and float32 weights."""

    def counted(numbers: jax.Array, weights: jax.Array) -> jax.Array:
        return jnp.zeros(classes, jnp.float32).at[numbers].add(weights)

    hits = counted(right, weights * (guesses == right))
    return {"hits": hits, "guesses": counted(guesses, weights), "cases": counted(right, weights)}


@dataclass(frozen=True)
class ExampleRows(Layout):
    """int32 [length]: ``tokens``, ``segment_ids``, ``positions``; ``types`` where the model has them; of an
    encoder-decoder ``decoder_tokens``, the encoder's one token late. The subclasses add the labels."""

    frames: Frames
    typed: bool
    start: int | None
    outputs: int
    longer: Longer
    overlap: int = 0
    smallest: int = 1

    @property
    def whole(self) -> Whole | None:
        """The tokens and what stands around them."""
        return Whole(self._room, self.longer, self.overlap)

    def _room(self, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        return np.maximum(np.asarray(first) + second + self.frames.extra(second), self.smallest)

    @property
    def identity(self) -> tuple[Any, ...]:
        """What an example takes."""
        pair = self.frames.pair
        extra = (self.frames.single.extra, pair and pair.extra)
        return ("examples", *extra, self.longer, self.overlap, self.smallest)

    @abc.abstractmethod
    def label_arrays(self) -> Row:
        """The arrays of labels, all zero."""

    @abc.abstractmethod
    def label(self, row: Row, segment: int, at: int, piece: Piece, framed: Framed) -> None:
        """Writes the labels of a piece whose framed tokens begin at ``at``."""

    def empty(self) -> Row:
        """All zero."""
        names = ["tokens", "segment_ids", "positions"]
        names += (["types"] if self.typed else []) + ([] if self.start is None else ["decoder_tokens"])
        return {name: np.zeros(self.length, np.int32) for name in names} | self.label_arrays()

    def row(self, pieces: Sequence[Piece], rng: np.random.Generator, other: Other) -> Row:
        """Each example in its frame."""
        row, at = self.empty(), 0
        for segment, piece in enumerate(pieces, start=1):
            framed = self.framed(piece)
            place = slice(at, at + len(framed.tokens))
            row["tokens"][place], row["segment_ids"][place] = framed.tokens, segment
            row["positions"][place] = np.arange(len(framed.tokens))
            if self.typed:
                row["types"][place] = framed.types
            if self.start is not None:
                row["decoder_tokens"][place] = [self.start, *framed.tokens[:-1]]
            self.label(row, segment, at, piece, framed)
            at = place.stop
        return row

    def framed(self, piece: Piece) -> Framed:
        """The example as the model reads it; one that is too long loses the ends of its texts, the longer one first."""
        second = np.zeros(0, np.int32) if piece.target is None else piece.target
        frame = self.frames.of_pairs() if len(second) else self.frames.single
        room = max(0, self.length - frame.extra)
        second = second[: max(room - len(piece.tokens), room // 2)]
        first = piece.tokens[: room - len(second)]
        return frame.around(self.ordered(first, second) if len(second) else [first])

    def ordered(self, first: np.ndarray, second: np.ndarray) -> list[np.ndarray]:
        """The texts of a pair as they are read."""
        return [first, second]


def check_classes(name: str, what: str, classes: Sequence[str], outputs: int) -> None:
    """Raises UserError unless the head has an output for each class of the source ``name``."""
    if len(classes) != outputs:
        shown = ", ".join(classes[:6]) + (", ..." if len(classes) > 6 else "")
        raise UserError(
            f"the source {name} has {len(classes)} {what} ({shown}), but model.classes is {outputs}: set "
            f"--model.classes {len(classes)}"
        )
