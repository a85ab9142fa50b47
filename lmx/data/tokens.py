"""The token store: the tokens of every document, memory-mapped, in parts that are whole or absent."""

import functools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from lmx.data import cache, parts
from lmx.data.documents import Documents
from lmx.data.encoders import Encoder, Streams
from lmx.data.records import RecordsPart, document_text, open_records
from lmx.data.tokenizer import BATCH_BYTES, TextTokenizer, load_tokenizer

Stream = Literal["tokens", "target", "labels"]
STREAMS: tuple[Stream, ...] = ("tokens", "target", "labels")


@dataclass(frozen=True)
class EncodePart:
    """Records to encode with the tokenizer in the directory ``tokenizer``, and, being examples, with ``encoder``.
    ``targets`` says that they are what is written after sources."""

    records: RecordsPart
    tokenizer: Path
    encoder: Encoder | None = None
    targets: bool = False

    @property
    def size(self) -> int:
        """Bytes of text."""
        return self.records.size


class TokenStore:
    """Tokens of documents by number.

    A document's stream is its tokens between two ``end`` tokens, so that the first token and the end are
    predicted too.

    ``name`` chooses among the streams that examples have: their ``target`` and their ``labels`` lie beside their
    tokens.

    Attributes:
      lengths: int32 ``[documents]``, tokens in each document, without the two ends.
    """

    def __init__(self, directory: Path, end_id: int, name: Stream = "tokens") -> None:
        self._directory, self._end, self._name = directory, end_id, name
        self._starts = np.concatenate([[0], np.cumsum(cache.read_json(directory / "meta.json")["parts"])])
        self.lengths: np.ndarray = np.load(directory / _beside(name, "lengths"), mmap_mode="r")
        self._part = functools.cache(self._open_part)

    def _open_part(self, part: int) -> tuple[np.ndarray, np.ndarray]:
        directory = self._directory / f"{part:06d}"
        names = (f"{self._name}.npy", _beside(self._name, "offsets"))
        tokens, offsets = (np.load(directory / name, mmap_mode="r") for name in names)
        return tokens, offsets

    def _found(self, document: int) -> tuple[np.ndarray, int, int]:
        part = int(np.searchsorted(self._starts, document, side="right")) - 1
        tokens, offsets = self._part(part)
        index = document - self._starts[part]
        return tokens, int(offsets[index]), int(offsets[index + 1])

    def values(self, document: int) -> np.ndarray:
        """What is stored for a document, without ends, as it is stored ``[length]``."""
        values, first, last = self._found(document)
        return values[first:last]

    def stream(self, document: int, start: int, count: int) -> np.ndarray:
        """``count`` tokens of a document's stream from ``start``, int32 ``[count]``."""
        tokens, first, last = self._found(document)
        result = np.full(count, self._end, np.int32)
        inner = tokens[first + max(start - 1, 0) : min(first + start - 1 + count, last)]
        offset = 1 if start == 0 else 0
        result[offset : offset + len(inner)] = inner
        return result


class Stores(NamedTuple):
    """The tokens of documents; of examples also a second text's (or a question's), and what there is to learn."""

    tokens: TokenStore
    target: TokenStore | None = None
    labels: TokenStore | None = None


def prepare_tokens(
    documents: Documents,
    tokenizer: TextTokenizer,
    tokenizer_dir: Path,
    root: Path,
    *,
    workers: int = 0,
    progress: bool = True,
    encoder: Encoder | None = None,
    targets: bool = False,
) -> Stores:
    """Encodes all documents, unless that is done, and opens the stores; ``encoder`` says how, where documents are
    examples, and ``targets`` that they are what is written after sources."""
    more = f"-{encoder.key}" if encoder else "-targets" if targets else ""
    directory = root / "tokens" / f"{documents.key}-{tokenizer_dir.name}{more}"
    meta = directory / "meta.json"
    if not meta.exists():
        with cache.locked(directory):
            if not meta.exists():
                jobs = [EncodePart(part, tokenizer_dir, encoder, targets) for part in documents.record_parts(directory)]
                _encode_all(jobs, directory, f"Tokenizing {documents.name}", workers, progress)
    target, labels = (TokenStore(directory, tokenizer.end_id, n) if encoder else None for n in STREAMS[1:])
    return Stores(TokenStore(directory, tokenizer.end_id), target, labels)


def _encode_all(jobs: Sequence[EncodePart], directory: Path, label: str, workers: int, progress: bool) -> None:
    open_records(jobs[0].records.dataset)  # imports TFDS, which a progress bar in a thread does not bear
    counts = parts.run_parts(encode_part, jobs, label=label, workers=workers, progress=progress)
    for name in STREAMS if jobs[0].encoder else STREAMS[:1]:
        offsets = [np.load(job.records.target / _beside(name, "offsets")) for job in jobs]
        lengths = np.concatenate([np.diff(o) for o in offsets]).astype(np.int32)
        np.save(directory / _beside(name, "lengths"), lengths)
    cache.write_json(directory / "meta.json", {"parts": counts})


def _beside(name: Stream, what: str) -> str:
    """The file of a stream's ``offsets`` or ``lengths``."""
    return f"{what}.npy" if name == "tokens" else f"{name}-{what}.npy"


@functools.lru_cache(maxsize=1)
def _tokenizer(directory: Path) -> TextTokenizer:
    return load_tokenizer(directory)


def encode_part(part: EncodePart) -> int:
    """Encodes records unless that is done; returns their number."""
    records, tokenizer = part.records, _tokenizer(part.tokenizer)
    if not records.target.exists():
        dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32
        dtypes: dict[Stream, Any] = {"tokens": dtype, "target": dtype, "labels": part.encoder and part.encoder.dtype}
        # Encoded before the directory is begun, so that a mistake leaves nothing.
        found = _examples(records, tokenizer, part.encoder) if part.encoder else [(t,) for t in _texts(part)]
        with cache.whole_dir(records.target) as directory:
            for index, name in enumerate(STREAMS if part.encoder else STREAMS[:1]):
                values = [np.array(streams[index], dtypes[name]) for streams in found]
                # One more, because an empty array cannot be mapped.
                np.save(directory / f"{name}.npy", np.concatenate([*values, np.zeros(1, dtypes[name])]))
                np.save(directory / _beside(name, "offsets"), np.cumsum([0, *map(len, values)], dtype=np.int64))
    return records.stop - records.start


def _examples(part: RecordsPart, tokenizer: TextTokenizer, encoder: Encoder) -> list[Streams]:
    records, column = open_records(part.dataset), part.dataset.example_column
    contents = []
    for index in range(part.start, part.stop):
        place = document_text(records, part.dataset, index)[1]
        contents.append((place, json.loads(records[index][column])))
    return list(encoder.encode(contents, tokenizer))


def _texts(part: EncodePart) -> Iterator[list[int]]:
    records, tokenizer = part.records, _tokenizer(part.tokenizer)
    tokenizer = tokenizer.of_targets if part.targets else tokenizer
    source, batch, size = open_records(records.dataset), list[str](), 0
    for index in range(records.start, records.stop):
        text = document_text(source, records.dataset, index)[0]
        batch.append(text if text.strip() else "")
        size += len(text)
        if size >= BATCH_BYTES:
            yield from tokenizer.encode_batch(batch)
            batch, size = [], 0
    yield from tokenizer.encode_batch(batch)
