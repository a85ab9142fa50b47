"""What a run trains on, as plain data: sources, weights, tokenizer, packing and the held-out share."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Source:
    """A set of documents and its share in the mixture; the subclasses say where the documents come from."""

    weight: float = 1.0
    """Share of training rows that come from this source, relative to the other sources' weights."""

    @property
    def special_tokens(self) -> tuple[str, ...]:
        """Special tokens that a trained tokenizer reserves for it."""
        return ()


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
class AlignedPages(Source):
    """Pairs of paragraphs from HTML pages in two languages, aligned by path and by the paragraphs' ids, as the help of
    LibreOffice has them. Whole pages are held out."""

    directory: str = ""
    """The pages in the source's language."""
    target_directory: str = ""
    """The same pages in the target's, under the same names."""


@dataclass(frozen=True)
class LocalFiles(Source):
    """Files on this machine: a column of .jsonl, .json, .csv, .tsv and .parquet files, and all of the text of others,
    such as .txt; all but Parquet may be gzipped."""

    files: tuple[str, ...] = ()
    """Paths or globs ("texts/**/*.txt"); a directory stands for all files in it."""
    text_column: str = "text"
    """The column that holds the text, in files that have columns."""
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
class Examples(Source):
    """Base class of sources whose documents are examples: the rows of files that have named columns."""

    files: tuple[str, ...] = ()
    """Paths or globs of .jsonl, .csv, .tsv, .json (a list of rows, or SQuAD's form) and .parquet files, or directories
    of prepared TFDS datasets in ArrayRecord files."""
    held_out_files: tuple[str, ...] = ()
    """The same, of the examples that are held out; none: those that data.held_out chooses by a hash."""
    split: str = "train"
    """Of a TFDS dataset: the split that is read."""
    held_out_split: str = ""
    """Of a TFDS dataset: another split, which is held out."""
    empty: Literal["refuse", "drop"] = "refuse"
    """What becomes of an example without a text, a target or an answer to learn: an error, or it is left out and
    counted."""


@dataclass(frozen=True)
class TextPairs(Examples):
    """Pairs of a source and a target, for SeqToSeq."""

    source_column: str = "source"
    """The column with what is read."""
    target_column: str = "target"
    """The column with what is written."""


@dataclass(frozen=True)
class LabelledTexts(Examples):
    """Texts, or pairs of texts, with the names or numbers of their classes, for Classification and MultiLabel."""

    text_column: str = "text"
    """The column with the text."""
    text_pair_column: str = ""
    """The column with a second text; none for single texts."""
    label_column: str = "label"
    """The column with the label: a name or a whole number, or a list of them where several hold."""
    classes: tuple[str, ...] = ()
    """The classes in the order of their numbers; none: those that are found, sorted."""


@dataclass(frozen=True)
class RatedTexts(Examples):
    """Texts, or pairs of texts, with numbers, for Regression."""

    text_column: str = "text"
    """The column with the text."""
    text_pair_column: str = ""
    """The column with a second text; none for single texts."""
    label_column: str = "label"
    """The column with the number, or a list of numbers."""


@dataclass(frozen=True)
class TaggedWords(Examples):
    """Lists of words with a tag for each, for TokenClassification."""

    words_column: str = "tokens"
    """The column with the words: a list, or (in .csv) words between spaces."""
    tags_column: str = "tags"
    """The column with as many tags: names or whole numbers."""
    classes: tuple[str, ...] = ()
    """The tags in the order of their numbers; none: those that are found, sorted."""


@dataclass(frozen=True)
class Answers(Examples):
    """Questions whose answers are spans of a context, for ExtractiveQa: SQuAD's columns."""

    context_column: str = "context"
    """The column with the text that holds the answer."""
    question_column: str = "question"
    """The column with the question."""
    answers_column: str = "answers"
    """The column with the answers, {"text": [...], "answer_start": [...]} or a list of {"text", "answer_start"}, in
    characters of the context. Without any, the context does not answer the question; of several, the first counts."""


CHATML = "chatml"
CHATML_TOKENS = ("<|im_start|>", "<|im_end|>")


@dataclass(frozen=True)
class Chats(Examples):
    """Conversations, for ChatSft."""

    messages_column: str = "messages"
    """The column with the messages: a list of {"role": ..., "content": ...}; one of the assistant's that has
    "train": false or "weight": 0 is not learned."""
    template: str = ""
    """The chat template: "" is the tokenizer's own, "chatml" one that is built in (a trained tokenizer reserves its
    <|im_start|> and <|im_end|>), else the path of a Jinja file."""

    @property
    def special_tokens(self) -> tuple[str, ...]:
        """Of the built-in template."""
        return CHATML_TOKENS if self.template == CHATML else ()


@dataclass(frozen=True)
class Preferences(Examples):
    """Prompts with two completions of which one was preferred, for Preference."""

    prompt_column: str = "prompt"
    """The column with the prompt: text."""
    chosen_column: str = "chosen"
    """The column with the completion that was preferred."""
    rejected_column: str = "rejected"
    """The column with the other one."""


@dataclass(frozen=True)
class StdlibPreferences(PythonStdlib):
    """Docstrings of the standard library with their code (preferred), and with the same code in which the lines after
    the first are in another order, for Preference."""


@dataclass(frozen=True)
class PreferredChats(Chats):
    """Conversations with two ways to go on of which one was preferred, for Preference."""

    messages_column: str = "prompt"
    """The column with the messages that came before (or the text of the user's one); "" where both others hold the
    whole conversation: it is then what they begin with alike."""
    chosen_column: str = "chosen"
    """The column with the preferred messages: a list of them, or the text of the assistant's answer."""
    rejected_column: str = "rejected"
    """The column with the others."""


@dataclass(frozen=True)
class StdlibChats(PythonStdlib):
    """Conversations about every documented function and class of the library, for ChatSft, in the built-in template."""

    template: str = CHATML
    """As that of Chats."""

    @property
    def special_tokens(self) -> tuple[str, ...]:
        """Of the built-in template."""
        return CHATML_TOKENS if self.template == CHATML else ()


@dataclass(frozen=True)
class StdlibModules(PythonStdlib):
    """Snippets of the standard library, labelled by the top-level module that they come from, for Classification."""

    modules: int = 20
    """How many classes: the modules with the most text."""
    snippet_bytes: int = 400
    """Whole lines are put together up to this many bytes."""
    per_module: int = 500
    """Snippets of a module at about the most, chosen by a hash of their text."""


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
    pattern: str = ""
    """Of a tiktoken file that is none of the published ones: the regular expression that splits text into words."""
    special_tokens: tuple[tuple[str, int], ...] = ()
    """Of the same: its special tokens, each with its id; of a published one, those that it is to have instead."""


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
