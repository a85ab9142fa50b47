"""Labelled examples as a TFDS dataset: the columns of any file become one form for each kind of example."""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any, ClassVar

from lmx.data import config
from lmx.data.builders import files, tables
from lmx.data.builders.base import DocumentsBuilder
from lmx.data.builders.span import Span
from lmx.data.chat import FLAGS, check_messages, is_learned
from lmx.errors import UserError

Record = dict[str, str]
HELD_OUT = "held_out"


class Empty(Exception):
    """Raised where a column has nothing in it, with its name."""


class Columns:
    """A row whose columns are asked for by name; mistakes name the row."""

    def __init__(self, row: Mapping[str, Any], place: str) -> None:
        self._row, self.place = row, place

    def value(self, column: str) -> Any:
        """The value of a column; None where it is null."""
        if column not in self._row:
            known = ", ".join(self._row) or "none"
            raise UserError(f"{self.place} has no column {column!r} (it has {known}): name it in the source's settings")
        return self._row[column]

    def wrong(self, column: str, expected: str) -> UserError:
        """The mistake of a column's value."""
        return UserError(f"{self.place}: column {column!r} is {self.value(column)!r:.80}, expected {expected}")

    def text(self, column: str) -> str:
        """The text of a column. Raises Empty if it is blank, UserError if it is something else."""
        value = self.value(column)
        if value is None or value == "" or (isinstance(value, str) and not value.strip()):
            raise Empty(column)
        if not isinstance(value, str):
            raise self.wrong(column, "text")
        return value

    def json(self, column: str) -> Any:
        """A value that may be written as JSON, as it is in .csv."""
        value = self.value(column)
        if not isinstance(value, str):
            return value
        try:
            return json.loads(value)
        except json.JSONDecodeError as error:
            raise self.wrong(column, f"JSON ({error})") from error

    def words(self, column: str) -> list[Any]:
        """A list, or text whose words are its items."""
        value = self.value(column)
        if isinstance(value, str) and not value.lstrip().startswith("["):
            return value.split()
        value = self.json(column)
        if not isinstance(value, list):
            raise self.wrong(column, "a list")
        return value

    def classes(self, column: str, given: Any, known: tuple[str, ...]) -> list[str]:
        """The names of classes, which are numbers in ``known`` where there are such names; of one or of a list."""
        names = []
        for value in given if isinstance(given, list) else [given]:
            if value is None or value == "":
                raise Empty(column)
            if not isinstance(value, str | int):
                raise self.wrong(column, "names or whole numbers")
            is_number = known and str(value) not in known and str(value).isdecimal() and int(value) < len(known)
            names.append(known[int(value)] if is_number else str(value))
            if known and names[-1] not in known:
                raise UserError(
                    f"{self.place}: column {column!r} has {value!r}, which is none of the source's {len(known)} "
                    f"classes ({', '.join(known[:6])}{', ...' if len(known) > 6 else ''})"
                )
        return names


def text_pair(source: config.TextPairs, row: Columns) -> Record:
    """A source and its target."""
    return {"text": row.text(source.source_column), "target": row.text(source.target_column)}


def _texts(source: config.LabelledTexts | config.RatedTexts, row: Columns, **labels: Any) -> Record:
    text = row.text(source.text_column)
    pair = {"pair": row.text(source.text_pair_column)} if source.text_pair_column else {}
    return {"text": text, "example": json.dumps({"text": text, **pair, **labels})}


def labelled(source: config.LabelledTexts, row: Columns) -> Record:
    """A text and its classes."""
    given = row.value(source.label_column)
    return _texts(source, row, labels=row.classes(source.label_column, given, source.classes))


def rated(source: config.RatedTexts, row: Columns) -> Record:
    """A text and its numbers."""
    given = row.value(source.label_column)
    if given is None or given == "":
        raise Empty(source.label_column)
    try:
        numbers = [float(value) for value in (given if isinstance(given, list) else [given])]
    except (TypeError, ValueError) as error:
        raise row.wrong(source.label_column, "a number") from error
    if not all(abs(number) < 1e30 for number in numbers):
        raise row.wrong(source.label_column, "a finite number")
    return _texts(source, row, values=numbers)


def tagged(source: config.TaggedWords, row: Columns) -> Record:
    """Words, and a tag for each."""
    words, tags = row.words(source.words_column), row.words(source.tags_column)
    if not words:
        raise Empty(source.words_column)
    if not all(isinstance(word, str) for word in words):
        raise row.wrong(source.words_column, "a list of words")
    if len(words) != len(tags):
        raise UserError(f"{row.place} has {len(words)} words but {len(tags)} tags, expected one for each")
    names = row.classes(source.tags_column, tags, source.classes)
    return {"text": " ".join(words), "example": json.dumps({"words": words, "labels": names})}


def answered(source: config.Answers, row: Columns) -> Record:
    """A context, a question, and where its answer is, if it has one."""
    context, question = row.text(source.context_column), row.text(source.question_column)
    found = row.json(source.answers_column) or []
    try:
        if isinstance(found, dict):
            found = [{"text": t, "answer_start": s} for t, s in zip(found["text"], found["answer_start"], strict=True)]
        spans = [(int(answer["answer_start"]), str(answer["text"])) for answer in found]
    except (KeyError, TypeError, ValueError) as error:
        raise row.wrong(
            source.answers_column, 'texts and their places, {"text": [...], "answer_start": [...]}'
        ) from error
    for start, text in spans:
        if not text.strip():
            raise Empty(source.answers_column)
        if start < 0 or context[start : start + len(text)] != text:
            raise UserError(f"{row.place}: the answer {text!r} is not at character {start} of its context")
    span = [spans[0][0], spans[0][0] + len(spans[0][1])] if spans else None
    return {"text": context, "example": json.dumps({"context": context, "question": question, "span": span})}


def chat(source: config.Chats, row: Columns) -> Record:
    """Messages."""
    messages = row.json(source.messages_column)
    if not messages:
        raise Empty(source.messages_column)
    try:
        check_messages(messages)
    except UserError as error:
        raise row.wrong(source.messages_column, 'a list of {"role": ..., "content": ...}') from error
    try:
        learned = [is_learned(message) for message in messages]
    except UserError as error:
        raise UserError(f"{row.place}: {error}") from error
    if not any(learned):
        raise Empty(f"{source.messages_column} (no message of the assistant to learn)")
    text = json.dumps(messages, ensure_ascii=False)
    return {"text": text, "example": json.dumps({"messages": messages})}


def preferred(source: config.Preferences, row: Columns) -> Record:
    """A prompt and two completions."""
    columns = (source.prompt_column, source.chosen_column, source.rejected_column)
    prompt, chosen, rejected = (row.text(column) for column in columns)
    return _compared(source, prompt, {"prompt": prompt, "chosen": chosen, "rejected": rejected})


def preferred_chat(source: config.PreferredChats, row: Columns) -> Record:
    """Messages, and two ways to go on."""
    both = (source.chosen_column, source.rejected_column)
    chosen, rejected = (_messages(row, column, "assistant") for column in both)
    messages = _messages(row, source.messages_column, "user") if source.messages_column else []
    if not source.messages_column:
        same = next((i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), 0)
        messages, chosen, rejected = chosen[:same], chosen[same:], rejected[same:]
    if not messages:
        raise Empty(source.messages_column or f"{source.chosen_column} (nothing that both begin with)")
    content = {"messages": messages, "chosen": chosen, "rejected": rejected}
    return _compared(source, json.dumps(messages, ensure_ascii=False), content)


def _messages(row: Columns, column: str, role: str) -> list[Any]:
    """Messages; of text, the one message of ``role``."""
    value = row.value(column)
    if isinstance(value, str) and not value.lstrip().startswith("["):
        return [{"role": role, "content": row.text(column)}]
    messages = row.json(column)
    if not messages:
        raise Empty(column)
    try:
        check_messages(messages)
    except UserError as error:
        raise row.wrong(column, 'a list of {"role": ..., "content": ...}, or text') from error
    for message in messages:
        if any(message.get(flag) is not None and not message[flag] for flag in FLAGS):
            raise UserError(
                f"{row.place}: a message has {' or '.join(FLAGS)} off, but preferences compare all of what either side "
                "says: remove it"
            )
    return list(messages)


def _compared(
    source: config.Preferences | config.PreferredChats, text: str, content: Record | dict[str, Any]
) -> Record:
    """What came before is the text: examples of the same prompt are held out together."""
    if content["chosen"] == content["rejected"]:
        raise Empty(f"{source.rejected_column} (it is the same as {source.chosen_column})")
    return {"text": text, "example": json.dumps(content)}


FORMS: dict[type[config.Source], Callable[[Any, Columns], Record]] = {
    config.TextPairs: text_pair,
    config.LabelledTexts: labelled,
    config.RatedTexts: rated,
    config.TaggedWords: tagged,
    config.Answers: answered,
    config.Chats: chat,
    config.Preferences: preferred,
    config.PreferredChats: preferred_chat,
}


class Examples(DocumentsBuilder):
    """Examples, one a row; ``example`` is its content as JSON, by which its kind is learned."""

    FEATURES: ClassVar[tuple[str, ...]] = ("text", "example", "split", "path")

    @classmethod
    def spans(cls, source: Any) -> list[Span]:
        """The files in sorted order, those that are held out after the others."""
        both = [(files.example_files(source), False), (files.example_files(source, held_out=True), True)]
        splits = {False: source.split, True: source.held_out_split or source.split}
        named = [(path, splits[out], out) for paths, out in both for path in paths]
        if source.held_out_split:
            found = files.example_files(source)
            named += [(path, source.held_out_split, True) for path in found if files.is_dataset(path)]
        return [replace(span, held_out=out) for path, split, out in named for span in tables.file_spans(path, split)]

    @classmethod
    def records(cls, source: Any, span: Span) -> Iterator[Record | None]:
        """The examples of a stretch; None for one that is left out because something in it is empty.

        Raises:
          UserError: a row that is not as the source says.
        """
        for place, row in tables.rows(span):
            columns = Columns(row, f"{span.path}{place}")
            try:
                record = FORMS[type(source)](source, columns)
            except Empty as error:
                if source.empty == "drop":
                    yield None
                    continue
                raise UserError(
                    f"{columns.place}: column {error} is empty: fill it, or set the source's empty to 'drop' to leave "
                    "such examples out"
                ) from error
            split = HELD_OUT if span.held_out else "train"
            yield {"example": "", **record, "split": split, "path": columns.place}


class Pairs(Examples):
    """Pairs of texts, one a row."""

    FEATURES = ("text", "target", "split", "path")

    @classmethod
    def records(cls, source: Any, span: Span) -> Iterator[Record | None]:
        """As the others', with the target as a text of its own."""
        for record in super().records(source, span):
            yield record and {name: record[name] for name in cls.FEATURES}
