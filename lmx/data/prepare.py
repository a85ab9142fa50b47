"""From a data configuration to documents, tokenizer and tokens: made once, then opened at once."""

import errno
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from lmx.data import cache, packing
from lmx.data.config import DataConfig, TokenizerFile, TrainedBpe
from lmx.data.documents import Documents, prepare_documents
from lmx.data.layout import Layout, NextTokens
from lmx.data.tokenizer import TextTokenizer, load_tokenizer, open_tokenizer, train_bpe
from lmx.data.tokens import TokenStore, prepare_tokens
from lmx.errors import UserError

Split = Literal["train", "held_out"]
SAMPLE_BYTES = 10_000_000  # what a BPE is trained on: more text changes few merges


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
    """Where documents are pairs: the tokens of their targets."""

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
          UserError: the length is not positive, or one of the layout and the source is of pairs and the other not.
        """
        layout = NextTokens(layout) if isinstance(layout, int) else layout
        if layout.length < 1:
            raise UserError(f"the row length is {layout.length}, expected at least 1 position")
        chosen, config = self.sources[source], self.config
        _check_pairs(self.source_names[source], chosen, layout)
        parts = (chosen.documents.key, self.tokenizer.fingerprint, config.held_out, split, layout.length)
        name = cache.key(*parts, config.packing, *([layout.identity] if layout.identity else []))
        with no_space_error(self.root):
            return packing.make_plan(
                chosen.tokens.lengths,
                chosen.chosen(split),
                layout,
                config.packing,
                self.root / "plans" / name,
                None if chosen.targets is None else chosen.targets.lengths,
            )

    def stats(self, length: Layout | int | None = None) -> dict[str, Any]:
        """Counts for each source, ready for JSON; with a layout or a row ``length``, also what the packing gives.

        Of each source: ``documents``, ``tokens``, ``bytes`` (of text) and ``dropped`` (blank or undecodable
        documents) in all, ``held_out_*`` of them held out, ``truncated`` (documents that lose tokens: none
        do, long ones are cut into several rows), and with ``length``: ``rows``, ``held_out_rows``, ``cut``
        (documents in several rows) and ``padding`` (share of positions).
        """
        sources = {}
        for index, source in enumerate(self.sources):
            sources[source.name] = _counts(source)
            if length is not None:
                sources[source.name] |= _packed(self.plan(index, "train", length), self.plan(index, "held_out", length))
        tokenizer = {"vocab_size": self.tokenizer.vocab_size, "fingerprint": self.tokenizer.fingerprint}
        return {"fingerprint": self.fingerprint, "tokenizer": tokenizer, "sources": sources}


def _counts(source: PreparedSource) -> dict[str, Any]:
    out = source.chosen("held_out")
    lengths, sizes = np.asarray(source.tokens.lengths), np.asarray(source.documents.sizes)
    return {
        "weight": source.weight,
        "documents": int((sizes > 0).sum()),
        "tokens": int(lengths.sum(dtype=np.int64)),
        "bytes": int(sizes.sum()),
        "dropped": source.documents.dropped,
        "truncated": 0,
        "held_out_documents": len(out),
        "held_out_tokens": int(lengths[out].sum(dtype=np.int64)),
        "held_out_bytes": int(sizes[out].sum()),
    }


def _packed(train: packing.Plan, held_out: packing.Plan) -> dict[str, Any]:
    return {
        "rows": len(train),
        "held_out_rows": len(held_out),
        "cut": train.cut,
        **({"left_out": train.dropped + held_out.dropped} if train.dropped + held_out.dropped else {}),
        "padding": round(train.padding, 6),
    }


def prepare(config: DataConfig, *, workers: int = 0, progress: bool = True) -> Prepared:
    """Prepares what is not prepared yet, and opens it.

    Killed at any moment, it goes on from the last whole part. ``workers`` processes take part; 0 is as many
    as the corpus is worth.

    Raises:
      UserError: bad configuration, an empty, unreadable or non-text source, a tokenizer file that changed since
        tokens were made with it, or a full disk.
    """
    _check(config)
    root = cache.cache_root(config.cache_dir)
    with no_space_error(root):
        documents = [prepare_documents(s, root, workers=workers, progress=progress) for s in config.sources]
        held_out = [held_out_mask(d, config.held_out) for d in documents]
        tokenizer, directory = _prepare_tokenizer(config, documents, held_out, root)
        encode = functools.partial(prepare_tokens, workers=workers, progress=progress)
        stores = [encode(d, tokenizer, directory, root) for d in documents]
        targets = [encode(t, tokenizer, directory, root) if (t := d.targets) else None for d in documents]
    names = _distinct([d.name for d in documents])
    weights = [source.weight for source in config.sources]
    sources = tuple(map(PreparedSource, names, weights, documents, stores, held_out, targets))
    fingerprint = cache.digest([d.fingerprint for d in documents], tokenizer.fingerprint, config.held_out)
    return Prepared(config, root, tokenizer, sources, fingerprint)


def _check(config: DataConfig) -> None:
    if not config.sources:
        raise UserError("the data has no sources: give at least one, such as PythonStdlib()")
    for source in config.sources:
        if not (source.weight > 0 and math.isfinite(source.weight)):
            raise UserError(f"a {type(source).__name__} has weight {source.weight}, expected a number above 0")
    if not 0 <= config.held_out <= 1:
        raise UserError(f"held_out is {config.held_out}, expected a share from 0 to 1")


def _check_pairs(name: str, source: PreparedSource, layout: Layout) -> None:
    if layout.pairs is not None and source.targets is None:
        raise UserError(
            f"the source {name} has documents, but the objective learns from pairs of a source and a target: use "
            "Docstrings or AlignedFiles"
        )
    if layout.pairs is None and source.targets is not None:
        raise UserError(f"the source {name} has pairs of a source and a target, which only SeqToSeq learns from")


def _distinct(names: Sequence[str]) -> list[str]:
    return [f"{n}_{names[:i].count(n) + 1}" if n in names[:i] else n for i, n in enumerate(names)]


def held_out_mask(documents: Documents, share: float) -> np.ndarray:
    """Which documents are held out, bool ``[documents]``: those whose text hashes low; copies go together.

    A small corpus may have none that low; then it is the one that hashes lowest, unless it is the only one.
    """
    hashes, real = np.asarray(documents.hashes), np.asarray(documents.sizes) > 0
    if share == 1:
        return real
    mask = (hashes < np.uint64(int(share * 2**64))) & real
    different = np.unique(hashes[real])
    if share and not mask.any() and len(different) > 1:
        mask = hashes == different[0]
    return mask


@contextmanager
def no_space_error(root: Path) -> Iterator[None]:
    """Turns a full disk into a sentence; what is finished stays, and nothing half-written does."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        # ArrayRecord raises RuntimeError, and NumPy an OSError that has no number.
        named = any(words in str(error) for words in ("No space left", "Disk quota", "requested and"))
        if not named and getattr(error, "errno", None) not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(
            f"there is no space left for prepared data in {root}: free some, or set cache_dir (or LMX_CACHE) to "
            "another disk, and run again; finished parts are kept"
        ) from error


def _prepare_tokenizer(
    config: DataConfig, documents: Sequence[Documents], held_out: Sequence[np.ndarray], root: Path
) -> tuple[TextTokenizer, Path]:
    """The tokenizer and the directory that keeps it with the fingerprint it had when first used."""
    wanted = config.tokenizer
    if isinstance(wanted, TokenizerFile):
        given = open_tokenizer(wanted)
        name = cache.key(str(Path(wanted.path).expanduser().absolute()), wanted.end_token)
        directory = root / "tokenizers" / name
        _keep(directory, lambda: given)
        return _unchanged(given, directory, wanted.path), directory
    if isinstance(wanted, TrainedBpe):
        weights = [source.weight for source in config.sources]
        keys = [d.key for d in documents]
        specials = [wanted.special_tokens] if wanted.special_tokens else []
        directory = root / "tokenizers" / cache.key(wanted.vocab_size, keys, weights, config.held_out, *specials)
        _keep(directory, lambda: _train(wanted, weights, documents, held_out))
        return _unchanged(load_tokenizer(directory), directory, str(directory)), directory
    raise UserError(f"{type(wanted).__name__} is no tokenizer: use TrainedBpe or TokenizerFile")


def _keep(directory: Path, make: Callable[[], TextTokenizer]) -> None:
    if directory.exists():
        return
    with cache.locked(directory.parent):
        if not directory.exists():
            tokenizer = make()
            with cache.whole_dir(directory) as temporary:
                tokenizer.save(temporary)
                cache.write_json(temporary / "fingerprint.json", tokenizer.fingerprint)


def _unchanged(tokenizer: TextTokenizer, directory: Path, path: str) -> TextTokenizer:
    if tokenizer.fingerprint != cache.read_json(directory / "fingerprint.json"):
        tokens = directory.parent.parent / "tokens" / f"*-{directory.name}"
        raise UserError(
            f"the tokenizer {path} has changed since tokens were made with it: restore it, give the new one "
            f"another file name, or delete {directory} and {tokens} to make them again"
        )
    return tokenizer


def _train(
    wanted: TrainedBpe,
    weights: Sequence[float],
    documents: Sequence[Documents],
    held_out: Sequence[np.ndarray],
) -> TextTokenizer:
    shares = [SAMPLE_BYTES * weight / sum(weights) for weight in weights]
    chosen = zip(documents, held_out, shares, strict=True)
    both = [(x, m, s / (1 + bool(d.targets))) for d, m, s in chosen for x in (d, d.targets) if x]
    samples = (_sample(d, ~m & (np.asarray(d.sizes) > 0), share) for d, m, share in both)
    texts = (text for sample in samples for text in sample)
    return train_bpe(texts, wanted.vocab_size, wanted.special_tokens)


def _sample(documents: Documents, mask: np.ndarray, limit: float) -> Iterator[str]:
    """Documents evenly from all over the source, up to about ``limit`` bytes."""
    chosen = np.flatnonzero(mask)
    total = int(np.asarray(documents.sizes)[chosen].sum())
    stride = max(1, math.ceil(total / limit))
    left = limit
    for text in documents.texts(chosen[::stride]):
        yield text[: int(left)]
        left -= len(text.encode())
        if left <= 0:
            return
