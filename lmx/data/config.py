"""What a run trains on, as plain data: sources, weights, tokenizer, packing and the held-out share."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Source:
    """A set of documents and its share in the mixture; the subclasses say where the documents come from."""

    weight: float = 1.0
    """Share of training rows that come from this source, relative to the other sources' weights."""


@dataclass(frozen=True)
class PythonStdlib(Source):
    """The standard library of the interpreter that runs lmx: about 30 MB, one document a module."""


@dataclass(frozen=True)
class Docstrings(PythonStdlib):
    """Pairs from the same library: the code of every documented function and class, and its docstring."""

    summary: bool = True
    """The docstring's first paragraph, on one line; else all of it."""


@dataclass(frozen=True)
class AlignedFiles(Source):
    """Pairs from plain text files that are aligned by line: line i of one is the source of line i of the other."""

    files: tuple[str, ...] = ()
    """Paths or globs of the sources, matched with the targets in sorted order."""
    target_files: tuple[str, ...] = ()
    """Paths or globs of the targets."""


@dataclass(frozen=True)
class LocalFiles(Source):
    """Files on this machine: .txt (or any plain text), .jsonl, .parquet; text and jsonl may be gzipped."""

    files: tuple[str, ...] = ()
    """Paths or globs ("texts/**/*.txt"); a directory stands for all files in it."""
    text_column: str = "text"
    """The column of a .jsonl or .parquet file that holds the text."""
    split: Literal["auto", "file", "paragraphs"] = "auto"
    """Documents of a text file: the file, paragraphs in groups of 8 kB, or (auto) such groups above 1 MB."""


@dataclass(frozen=True)
class Tfds(Source):
    """A TensorFlow Datasets dataset in ArrayRecord files, read without TensorFlow."""

    name: str = ""
    """Directory of a prepared dataset (it holds dataset_info.json), or a TFDS name."""
    split: str = "train"
    """A TFDS split or slice of one: "train", "train[:10%]"."""
    text_column: str = "text"
    """The feature that holds the text."""
    data_dir: str = ""
    """Where TFDS looks for prepared datasets; empty is its own default."""


@dataclass(frozen=True)
class Tokenizer:
    """How text becomes tokens; the subclasses say which tokenizer."""


@dataclass(frozen=True)
class TrainedBpe(Tokenizer):
    """A byte-level BPE trained on the training documents of the run's own sources."""

    vocab_size: int = 8192
    """Number of tokens: 256 bytes, the end of text, other special tokens, and merges."""
    special_tokens: tuple[str, ...] = ()
    """Special tokens beside the end of text; what the run's objective needs is added by itself."""


@dataclass(frozen=True)
class TokenizerFile(Tokenizer):
    """A tokenizer from a file: tokenizer.json, a SentencePiece .model, or a .tiktoken file."""

    path: str = ""
    """The file; the directory of a Hugging Face model works too."""
    end_token: str | None = None
    """The token that ends a document; None finds the tokenizer's own."""


@dataclass(frozen=True)
class DataConfig:
    """Everything that decides which tokens a run sees, in which rows and in which order."""

    sources: tuple[Source, ...] = (PythonStdlib(),)
    """Where the documents come from; several make a mixture by their weights."""
    tokenizer: Tokenizer = TrainedBpe()
    """How text becomes tokens."""
    packing: Literal["best_fit", "split"] = "best_fit"
    """Rows of whole documents where they fit (best_fit), or all documents in a line cut every row (split)."""
    held_out: float = 0.02
    """Share of documents kept from training, by a hash of their text: stable as the corpus grows."""
    shuffle: bool = True
    """A new order of the rows in each epoch, or the order of the documents."""
    cache_dir: str = ""
    """Where prepared data lives; empty is $LMX_CACHE, else ~/.cache/lmx."""
