"""From a data configuration to documents, tokenizer and tokens: made once, then opened at once."""

import errno
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np

from lmx.data import cache, packing
from lmx.data.chat import TEMPLATE
from lmx.data.config import Chats, DataConfig, Source, StdlibChats, TokenizerFile
from lmx.data.documents import Documents, Kind, prepare_documents
from lmx.data.encoders import chat_template, encoder_of
from lmx.data.layout import Layout, NextTokens
from lmx.data.splits import SPLITS, Split, held_out_mask
from lmx.data.statistics import counts, in_words, losses, packed
from lmx.data.tokenizer import TextTokenizer, open_tokenizer
from lmx.data.tokenizer_making import prepare_tokenizer
from lmx.data.tokens import Stores, TokenStore, prepare_tokens
from lmx.errors import Interrupted, UserError


@dataclass(frozen=True)
class PreparedSource:
    """One source of the mixture, with its documents and their tokens."""

    name: str
    weight: float
    documents: Documents
    tokens: TokenStore
    held_out: np.ndarray
    """bool ``[documents]``"""
    targets: TokenStore | None = None
    """Where documents are pairs or other examples: the tokens of their targets or second texts."""
    labels: TokenStore | None = None
    """Where documents are labelled examples: what there is to learn of them."""
    classes: tuple[str, ...] = ()
    """The names of the classes, of all sources together."""
    encoding: str = ""
    """Changes when labelled examples are encoded in another way."""

    def chosen(self, split: Split) -> np.ndarray:
        """The documents of a split that have text, int64 ``[chosen]``, in order."""
        wanted = self.held_out if split == "held_out" else ~self.held_out
        return np.flatnonzero(wanted & (np.asarray(self.documents.sizes) > 0))


@dataclass(frozen=True)
class Prepared:
    """Data that is ready to train on.

    Attributes:
      fingerprint: a hash of all texts, the tokenizer and the held-out share; the same on every machine.
    """

    config: DataConfig
    root: Path
    tokenizer: TextTokenizer
    sources: tuple[PreparedSource, ...]
    fingerprint: str

    @property
    def source_names(self) -> tuple[str, ...]:
        """What the sources are called in reports, in the order of the configuration."""
        return tuple(source.name for source in self.sources)

    def texts(self, split: Split) -> Iterator[str]:
        """The documents of a split, source by source, in order."""
        for source in self.sources:
            yield from source.documents.texts(source.chosen(split))

    def plan(self, source: int, split: Split, layout: Layout | int) -> packing.Plan:
        """The rows of a source, in a layout or (by their length) for next-token prediction; planned on first use.

        Raises:
          UserError: the length is not positive, or the source's documents are not what the layout takes.
        """
        layout = NextTokens(layout) if isinstance(layout, int) else layout
        if layout.length < 1:
            raise UserError(f"the row length is {layout.length}, expected at least 1 position")
        chosen, config = self.sources[source], self.config
        _check_kind(self.source_names[source], chosen, layout)
        parts = (chosen.documents.key, self.tokenizer.fingerprint, config.held_out, split, layout.length)
        more = [*([layout.identity] if layout.identity else []), *([chosen.encoding] if chosen.encoding else [])]
        name = cache.key(*parts, config.packing, *more)
        with explained(self.root):
            return packing.make_plan(
                chosen.tokens.lengths,
                chosen.chosen(split),
                layout,
                config.packing,
                self.root / "plans" / name,
                None if chosen.targets is None else chosen.targets.lengths,
                *([] if chosen.labels is None else [chosen.labels.values]),
            )

    def stats(self, length: Layout | int | None = None) -> dict[str, Any]:
        """Counts for each source, ready for JSON; with a layout or a row ``length``, also what the packing gives.

        Of each source: ``documents``, ``tokens``, ``bytes`` (of text) and ``dropped`` (blank or undecodable
        documents) in all, ``held_out_*`` of them held out, and with ``length``: ``rows``, ``held_out_rows``,
        ``truncated`` (examples that lose tokens; texts do not), ``cut`` (documents in several rows), ``left_out``
        (examples that take more than a row), ``untaught`` (examples left out because nothing is left to learn of them
        once they are truncated) and ``padding`` (share of positions). ``classes`` are the names, where there are such.
        """
        sources = {}
        for index, source in enumerate(self.sources):
            sources[source.name] = counts(source)
            if length is not None:
                train, held_out = (self.plan(index, split, length) for split in SPLITS)
                sources[source.name] |= packed(train, held_out, length)
        tokenizer = {"vocab_size": self.tokenizer.vocab_size, "fingerprint": self.tokenizer.fingerprint}
        classes = {"classes": list(self.classes)} if self.classes else {}
        return {"fingerprint": self.fingerprint, "tokenizer": tokenizer, "sources": sources} | classes

    def notes(self, layout: Layout) -> list[str]:
        """A sentence about each source in a layout, and those about what the layout does not take as it is."""
        notes = [in_words(name, found) for name, found in self.stats(layout)["sources"].items()]
        for index, source in enumerate(self.sources):
            plans = [self.plan(index, split, layout) for split in SPLITS]
            notes += losses(source, layout, plans) if source.targets else []
        return notes

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes, in the order of their numbers; none where examples have none."""
        return self.sources[0].classes

    @property
    def template(self) -> str | None:
        """The chat template of its chats, if it has any."""
        chats = [source for source in self.config.sources if isinstance(source, Chats | StdlibChats)]
        return chat_template(chats[0], self.tokenizer, self.config.tokenizer)[0] if chats else None

    def save_tokenizer(self, directory: Path) -> None:
        """Writes the tokenizer, and the chat template beside it."""
        self.tokenizer.save(directory)
        if self.template is not None:
            (directory / TEMPLATE).write_text(self.template, encoding="utf-8")


def prepare(
    config: DataConfig,
    *,
    workers: int = 0,
    progress: bool = True,
    accept: Callable[[TextTokenizer], None] = lambda tokenizer: None,
) -> Prepared:
    """Prepares what is not prepared yet, and opens it.

    Killed at any moment, it goes on from the last whole part. ``workers`` processes take part; 0 is as many
    as the corpus is worth. ``accept`` may refuse the tokenizer, by an error, before any text is tokenized: one from a
    file before any is read.

    Raises:
      UserError: bad configuration, an empty, unreadable or non-text source, a tokenizer file that changed since
        tokens were made with it, or a full disk.
      Interrupted: Ctrl-C; the same call goes on.
    """
    _check(config)
    root = cache.cache_root(config.cache_dir)
    with explained(root):
        if isinstance(config.tokenizer, TokenizerFile):
            accept(open_tokenizer(config.tokenizer))
        documents = [prepare_documents(s, root, workers=workers, progress=progress) for s in config.sources]
        held_out = [held_out_mask(d, config.held_out) for d in documents]
        tokenizer, directory = prepare_tokenizer(config, documents, held_out, root, progress=progress)
        accept(tokenizer)
        classes = _classes(config, documents)
        encode = functools.partial(_encode, config, classes, tokenizer, directory, root, workers, progress)
        encoded = [encode(*pair) for pair in zip(config.sources, documents, strict=True)]
    names = _distinct([d.name for d in documents])
    sources = tuple(
        PreparedSource(name, s.weight, d, stores.tokens, out, stores.target, stores.labels, classes, key)
        for name, s, d, out, (stores, key) in zip(names, config.sources, documents, held_out, encoded, strict=True)
    )
    keys = [key for _, key in encoded if key]
    parts = ([d.fingerprint for d in documents], tokenizer.fingerprint, config.held_out, *([keys] if keys else []))
    return Prepared(config, root, tokenizer, sources, cache.digest(*parts))


def _encode(
    config: DataConfig,
    classes: tuple[str, ...],
    tokenizer: TextTokenizer,
    directory: Path,
    root: Path,
    workers: int,
    progress: bool,
    source: Source,
    documents: Documents,
) -> tuple[Stores, str]:
    """The tokens of a source, and what changes when its examples are encoded in another way."""
    encode = functools.partial(prepare_tokens, workers=workers, progress=progress)
    encoder = encoder_of(source, documents, classes, tokenizer, config.tokenizer)
    stores = encode(documents, tokenizer, directory, root, encoder=encoder)
    if documents.targets:
        stores = stores._replace(target=encode(documents.targets, tokenizer, directory, root, targets=True).tokens)
    return stores, encoder.key if encoder else ""


def _check(config: DataConfig) -> None:
    if not config.sources:
        raise UserError("the data has no sources: give at least one, such as PythonStdlib()")
    for source in config.sources:
        if not (source.weight > 0 and math.isfinite(source.weight)):
            raise UserError(f"a {type(source).__name__} has weight {source.weight}, expected a number above 0")
    if not 0 <= config.held_out <= 1:
        raise UserError(f"held_out is {config.held_out}, expected a share from 0 to 1")


WHAT: dict[Kind, tuple[str, str]] = {
    "texts": ("documents", "PythonStdlib, LocalFiles or Tfds"),
    "pairs": ("pairs of a source and a target", "Docstrings, AlignedFiles, AlignedPages or TextPairs"),
    "classes": ("texts with classes", "LabelledTexts or StdlibModules"),
    "numbers": ("texts with numbers", "RatedTexts"),
    "tags": ("words with tags", "TaggedWords"),
    "answers": ("questions with answers", "Answers"),
    "chats": ("chats", "Chats or StdlibChats"),
    "preferences": ("preferences", "Preferences, PreferredChats or StdlibPreferences"),
}
"""What documents of each kind are called, and the sources that give them."""


def _check_kind(name: str, source: PreparedSource, layout: Layout) -> None:
    if source.documents.kind not in layout.kinds:
        wanted, sources = WHAT[cast(Kind, layout.kinds[0])]
        raise UserError(
            f"the source {name} has {WHAT[source.documents.kind][0]}, but the objective learns from {wanted}: use "
            f"{sources}"
        )
    if source.labels is not None:
        layout.check_examples(
            name, source.classes, np.asarray(source.labels.lengths)[np.asarray(source.documents.sizes) > 0]
        )


def _classes(config: DataConfig, documents: Sequence[Documents]) -> tuple[str, ...]:
    """The names of the classes of all sources: those that a source names, else all that are found, sorted.

    Raises:
      UserError: sources that name different ones, or a class that is none of those that another names.
    """
    named = {tuple(c) for source in config.sources if (c := getattr(source, "classes", ()))}
    if len(named) > 1:
        raise UserError("the sources name different classes: give all of them the same, in the same order")
    found = {name for of in documents for name in of.classes}
    if not named:
        return tuple(sorted(found, key=(lambda c: (len(c), c)) if all(c.isdecimal() for c in found) else None))
    (known,) = named
    if len(set(known)) < len(known):
        raise UserError(f"a source names a class twice: {', '.join(known)}")
    if other := sorted(found - set(known)):
        raise UserError(f"a source has the class {other[0]!r}, which is none of those that another names")
    return known


def _distinct(names: Sequence[str]) -> list[str]:
    return [f"{n}_{names[:i].count(n) + 1}" if n in names[:i] else n for i, n in enumerate(names)]


@contextmanager
def explained(root: Path) -> Iterator[None]:
    """Turns a full disk and Ctrl-C into a sentence; what is finished stays, and nothing half-written does."""
    try:
        yield
    except KeyboardInterrupt as error:
        what = f"preparing the data in {root} was interrupted; finished parts are kept"
        raise Interrupted(f"{what}: run the same command again to go on") from error
    except (OSError, RuntimeError) as error:
        # ArrayRecord raises RuntimeError, and NumPy an OSError that has no number.
        named = any(words in str(error) for words in ("No space left", "Disk quota", "requested and"))
        if not named and getattr(error, "errno", None) not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(
            f"there is no space left for prepared data in {root}: free some, or set cache_dir (or LMX_CACHE) to "
            "another disk, and run again; finished parts are kept"
        ) from error
