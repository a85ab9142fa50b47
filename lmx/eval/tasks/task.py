"""What a task is: examples of local files, what a model is asked about each, and what its answers are measured by."""

import abc
import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from lmx.data.tokenizer import TextTokenizer
from lmx.decode.loaded import Model
from lmx.errors import UserError
from lmx.eval.asking import Asking, Likelihood, Pair, TargetTooLong, asking, likelihoods
from lmx.eval.likelihood import Scorer
from lmx.eval.metrics.measure import Measure
from lmx.eval.tables import Example, column, listed, read_rows

Template = str | Callable[[Example], str]
"""Text of an example: with its columns in braces ("{question}?"), or a function of it."""
TooLong = Literal["truncate", "drop", "refuse"]


@dataclass(frozen=True)
class Examinee:
    """The model that is asked."""

    model: Model
    batch: int = 8

    @functools.cached_property
    def scorer(self) -> Scorer:
        """Reads rows."""
        return Scorer(self.model, self.batch)

    @functools.cached_property
    def asking(self) -> Asking:
        """How it is asked for likelihoods."""
        return asking(self.model)

    @property
    def tokenizer(self) -> TextTokenizer:
        """The model's.

        Raises:
          UserError: it has none.
        """
        if self.model.tokenizer is None:
            raise UserError("this model has no tokenizer, so it cannot be asked about texts")
        return self.model.tokenizer

    def likelihoods(self, pairs: Sequence[Pair]) -> list[Likelihood]:
        """The likelihood of each pair's target."""
        return likelihoods(self.scorer, self.asking, pairs)


@dataclass(frozen=True)
class Outcome:
    """What a task found.

    Attributes:
      n: examples that were measured.
      measures: by name.
      notes: what else is to be told: signatures, definitions.
      truncated: examples that lost a part of their context.
      dropped: examples that were too long and left out.
    """

    n: int
    measures: Mapping[str, Measure]
    notes: Mapping[str, str] = field(default_factory=dict)
    truncated: int = 0
    dropped: int = 0


@dataclass(frozen=True)
class Task(abc.ABC):
    """Base class. A task file has a function that returns one; ``lmx eval --tasks FILE`` runs it."""

    files: tuple[str, ...] = ()
    """Paths or globs of .jsonl, .json, .csv, .tsv, .parquet or .txt files; ``--files`` replaces them."""
    limit: int = 0
    """Only the first examples; 0 for all."""
    too_long: TooLong = "truncate"
    """What becomes of an example that exceeds the model's context: its prompt loses its front, or what a task head
    reads its end (truncate); it is left out (drop); or the task ends (refuse). What is truncated or dropped is
    counted. An answer whose likelihood is asked for is never cut: where it alone is too long, only drop goes on."""

    @abc.abstractmethod
    def run(self, examinee: Examinee) -> Outcome:
        """Asks the model about every example.

        Raises:
          UserError: files, columns or a model that do not fit, or nothing to measure.
        """

    def rows(self, content: Any) -> Iterator[Example]:
        """The rows of a .json file's content: a list of objects, or one under ``data``."""
        return listed(content)

    def joined(self, rows: list[Example]) -> list[Example]:
        """All rows of the files, with what other files say of them."""
        return rows

    def examples(self) -> list[Example]:
        """The examples, the first ``limit`` of them.

        Raises:
          UserError: there are none.
        """
        if not self.files:
            raise UserError(f'the task {type(self).__name__} has no files; give --files "data/*.jsonl", or name them')
        rows = read_rows(self.files, self.rows)
        if not rows:
            raise UserError(f"{', '.join(self.files)}: there is no example in it")
        return self.joined(rows)[: self.limit or None]

    def keeps(self, cut: int, index: int) -> bool:
        """Whether the example number ``index``, ``cut`` tokens too long, is asked about.

        Raises:
          UserError: it is too long, and such ones are refused.
        """
        if cut and self.too_long == "refuse":
            raise UserError(
                f"example {index} is {cut} tokens longer than the model's context; shorten it, or let too_long be "
                '"truncate" or "drop"'
            )
        return not (cut and self.too_long == "drop")

    def fitting(self, examples: int, pairs: Callable[[int], list[Pair]]) -> "Asked":
        """The pairs of each example, by its number, without the examples that are dropped.

        Raises:
          UserError: an example is too long, and is neither dropped nor to be truncated.
        """
        found = [(index, self._fitting(index, pairs)) for index in range(examples)]
        kept = [(index, own) for index, own in found if own is not None]
        return Asked([own for _, own in kept], [index for index, _ in kept])

    def _fitting(self, index: int, pairs: Callable[[int], list[Pair]]) -> list[Pair] | None:
        try:
            own = pairs(index)
        except TargetTooLong as error:
            if self.too_long == "drop":
                return None
            raise UserError(f'example {index}: {error}; shorten it, or let too_long be "drop"') from error
        return own if self.keeps(max(pair.cut for pair in own), index) else None


@dataclass(frozen=True)
class Asked:
    """The pairs of the examples that are asked about, and those examples' numbers."""

    pairs: list[list[Pair]]
    kept: list[int]

    @property
    def truncated(self) -> int:
        """How many of them lost a part of their context."""
        return sum(any(pair.cut for pair in own) for own in self.pairs)

    def scores(self, examinee: Examinee) -> list[list[Likelihood]]:
        """The likelihood of each pair."""
        found = iter(examinee.likelihoods([pair for own in self.pairs for pair in own]))
        return [[next(found) for _ in own] for own in self.pairs]


@dataclass(frozen=True)
class Prompted(Task):
    """A task whose model reads a prompt, and before it perhaps examples with their answers."""

    prompt: Template = ""
    """What the model reads of an example, up to its answer."""
    delimiter: str = " "
    """Between the prompt and an answer."""
    description: str = ""
    """In front of everything."""
    shots: int = 0
    """Examples with their answers that stand before each prompt."""
    shot_files: tuple[str, ...] = ()
    """Where they come from; by default from the files themselves, and then an example is never its own."""
    shot_separator: str = "\n\n"
    """After the description and each of those examples."""
    seed: int = 0
    """Which are taken depends on this and the example's number alone."""

    @abc.abstractmethod
    def answer_text(self, row: Example) -> str:
        """The right answer of an example, as it is shown before others."""

    def asked(self, examinee: Examinee, rows: Sequence[Example], choices: Callable[[Example], Sequence[str]]) -> Asked:
        """Each example's choices after its context, without the examples that are dropped."""
        contexts, way = self.contexts(rows), examinee.asking
        return self.fitting(
            len(rows), lambda i: [way.pair(contexts[i], self.delimiter + choice) for choice in choices(rows[i])]
        )

    def contexts(self, rows: Sequence[Example]) -> list[str]:
        """What the model reads before each answer.

        Raises:
          UserError: there are fewer other examples than shots.
        """
        own = not self.shot_files
        pool = rows if own else read_rows(self.shot_files, self.rows)
        if self.shots > len(pool) - own:
            raise UserError(f"{self.shots} shots need as many other examples, but there are {len(pool) - own}")
        return [self._context(row, pool, i if own else -1) for i, row in enumerate(rows)]

    def _context(self, row: Example, pool: Sequence[Example], itself: int) -> str:
        shown = [self.description] if self.description else []
        if self.shots:
            digest = hashlib.sha256(f"{self.seed}/{rendered(self.prompt, row)}/{itself}".encode()).digest()
            rng = np.random.default_rng(int.from_bytes(digest[:8], "little"))
            others = [i for i in range(len(pool)) if i != itself]
            chosen = [pool[others[i]] for i in rng.choice(len(others), self.shots, replace=False)]
            shown += [f"{rendered(self.prompt, s)}{self.delimiter}{self.answer_text(s)}" for s in chosen]
        return self.shot_separator.join([*shown, rendered(self.prompt, row)])


def rendered(template: Template, row: Example) -> str:
    """A template's text of an example.

    Raises:
      UserError: it names a column that is not there, or the function raises.
    """
    return str(value(template, row) if callable(template) else _formatted(template, row))


def value(of: str | Callable[[Example], Any], row: Example) -> Any:
    """A column of an example, or what a function makes of it.

    Raises:
      UserError: there is no such column, or the function raises.
    """
    if not callable(of):
        return column(row, of)
    try:
        return of(row)
    except UserError:
        raise
    except KeyError as error:
        raise UserError(f"there is no column {error}; the columns are {', '.join(row) or 'none'}") from error
    except Exception as error:
        name = getattr(of, "__name__", "a function")
        raise UserError(f"the task's {name} raised {type(error).__name__} for an example: {error}") from error


def _formatted(template: str, row: Example) -> str:
    try:
        return template.format_map(row)
    except KeyError as error:
        raise UserError(f"there is no column {error}; the columns are {', '.join(row) or 'none'}") from error
    except (ValueError, IndexError, AttributeError) as error:
        raise UserError(f"the template {template!r} is not one: {error}; write a brace of the text twice") from error


def described(task: Task) -> dict[str, Any]:
    """The task's configuration as JSON-ready data; functions by their names."""

    def plain(content: Any) -> Any:
        if callable(content):
            return f"function {getattr(content, '__name__', repr(content))}"
        return list(content) if isinstance(content, tuple) else content

    fields = {f.name: plain(getattr(task, f.name)) for f in dataclasses.fields(task)}
    return {"type": type(task).__name__, **fields}
