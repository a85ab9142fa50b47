"""The token store: the tokens of every document, memory-mapped, in parts that are whole or absent."""

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lmx.data import cache, parts
from lmx.data.documents import Documents, RecordsPart, document_text, open_records
from lmx.data.tokenizer import BATCH_BYTES, TextTokenizer, load_tokenizer


@dataclass(frozen=True)
class EncodePart:
    """Records to encode with the tokenizer saved in the directory ``tokenizer``."""

    records: RecordsPart
    tokenizer: Path

    @property
    def size(self) -> int:
        """Bytes of text."""
        return self.records.size


class TokenStore:
    """Tokens of documents by number.

    A document's stream is its tokens between two ``end`` tokens, so that the first token and the end are
    predicted too.

    Attributes:
      lengths: int32 ``[documents]``, tokens in each document, without the two ends.
    """

    def __init__(self, directory: Path, end_id: int) -> None:
        self._directory, self._end = directory, end_id
        self._starts = np.concatenate([[0], np.cumsum(cache.read_json(directory / "meta.json")["parts"])])
        self.lengths: np.ndarray = np.load(directory / "lengths.npy", mmap_mode="r")
        self._part = functools.cache(self._open_part)

    def _open_part(self, part: int) -> tuple[np.ndarray, np.ndarray]:
        directory = self._directory / f"{part:06d}"
        return np.load(directory / "tokens.npy", mmap_mode="r"), np.load(directory / "offsets.npy", mmap_mode="r")

    def stream(self, document: int, start: int, count: int) -> np.ndarray:
        """``count`` tokens of a document's stream from ``start``, int32 ``[count]``."""
        part = int(np.searchsorted(self._starts, document, side="right")) - 1
        tokens, offsets = self._part(part)
        index = document - self._starts[part]
        first, last = int(offsets[index]), int(offsets[index + 1])
        result = np.full(count, self._end, np.int32)
        inner = tokens[first + max(start - 1, 0) : min(first + start - 1 + count, last)]
        offset = 1 if start == 0 else 0
        result[offset : offset + len(inner)] = inner
        return result


def prepare_tokens(
    documents: Documents,
    tokenizer: TextTokenizer,
    tokenizer_dir: Path,
    root: Path,
    *,
    workers: int = 0,
    progress: bool = True,
) -> TokenStore:
    """Encodes all documents, unless that is done, and opens the store."""
    directory = root / "tokens" / f"{documents.key}-{tokenizer_dir.name}"
    meta = directory / "meta.json"
    if not meta.exists():
        with cache.locked(directory):
            if not meta.exists():
                _encode_all(documents, tokenizer_dir, directory, workers, progress)
    return TokenStore(directory, tokenizer.end_id)


def _encode_all(documents: Documents, tokenizer: Path, directory: Path, workers: int, progress: bool) -> None:
    jobs = [EncodePart(part, tokenizer) for part in documents.record_parts(directory)]
    label = f"Tokenizing {documents.name}"
    counts = parts.run_parts(encode_part, jobs, label=label, workers=workers, progress=progress)
    offsets = [np.load(job.records.target / "offsets.npy") for job in jobs]
    np.save(directory / "lengths.npy", np.concatenate([np.diff(o) for o in offsets]).astype(np.int32))
    cache.write_json(directory / "meta.json", {"parts": counts})


@functools.lru_cache(maxsize=1)
def _tokenizer(directory: Path) -> TextTokenizer:
    return load_tokenizer(directory)


def encode_part(part: EncodePart) -> int:
    """Encodes records unless that is done; returns their number."""
    records, tokenizer = part.records, _tokenizer(part.tokenizer)
    if not records.target.exists():
        dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32
        encoded = [np.array(ids, dtype) for ids in _encoded(records, tokenizer)]
        with cache.whole_dir(records.target) as directory:
            # One more, because an empty array cannot be mapped.
            np.save(directory / "tokens.npy", np.concatenate([*encoded, np.zeros(1, dtype)]))
            np.save(directory / "offsets.npy", np.cumsum([0, *map(len, encoded)], dtype=np.int64))
    return records.stop - records.start


def _encoded(part: RecordsPart, tokenizer: TextTokenizer) -> Iterator[list[int]]:
    source, batch, size = open_records(part.dataset), list[str](), 0
    for index in range(part.start, part.stop):
        text = document_text(source, part.dataset, index)[0]
        batch.append(text if text.strip() else "")
        size += len(text)
        if size >= BATCH_BYTES:
            yield from tokenizer.encode_batch(batch)
            batch, size = [], 0
    yield from tokenizer.encode_batch(batch)
