"""From an example's content to tokens and what there is to learn: one encoder for each kind of example."""

import abc
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np

from lmx.data import cache
from lmx.data.chat import CHATML, FLAGS, ChatTemplate, Message, find_template, is_learned
from lmx.data.config import CHATML as CHATML_NAME
from lmx.data.config import Chats, PreferredChats, Source, StdlibChats, Tokenizer, TokenizerFile
from lmx.data.documents import Documents
from lmx.data.tokenizer import Spanned, TextTokenizer
from lmx.errors import UserError

Content = tuple[str, Mapping[str, Any]]
"""Where an example comes from, for people, and its content."""


class Streams(NamedTuple):
    """An example: its tokens [any], those of its second text [any], and its labels [any], as the encoder says."""

    tokens: Sequence[int]
    target: Sequence[int] = ()
    labels: Sequence[float] = ()


class Encoder(abc.ABC):
    """Base class; an encoder is sent to other processes."""

    dtype: ClassVar[Any] = np.int32

    @property
    def key(self) -> str:
        """Changes when what is stored does."""
        return cache.key(type(self).__name__, repr(self))

    @abc.abstractmethod
    def encode(self, contents: Sequence[Content], tokenizer: TextTokenizer) -> Iterator[Streams]:
        """The streams of each example. Raises UserError, with the example's place, for one that cannot be."""


def _texts(contents: Sequence[Content], tokenizer: TextTokenizer) -> Iterator[tuple[list[int], list[int]]]:
    """The tokens of each example's text and of the second one, if it has one."""
    ones = tokenizer.encode_batch([content["text"] for _, content in contents])
    twos = tokenizer.encode_batch([content.get("pair", "") for _, content in contents])
    return zip(ones, twos, strict=True)


@dataclass(frozen=True)
class ClassEncoder(Encoder):
    """Labels: the numbers of a text's classes."""

    classes: tuple[str, ...]

    def encode(self, contents: Sequence[Content], tokenizer: TextTokenizer) -> Iterator[Streams]:
        """See the class."""
        number = {name: index for index, name in enumerate(self.classes)}
        for (_, content), texts in zip(contents, _texts(contents, tokenizer), strict=True):
            yield Streams(*texts, [number[name] for name in content["labels"]])


@dataclass(frozen=True)
class NumberEncoder(Encoder):
    """Labels: a text's numbers, float32."""

    dtype = np.float32

    def encode(self, contents: Sequence[Content], tokenizer: TextTokenizer) -> Iterator[Streams]:
        """See the class."""
        for (_, content), texts in zip(contents, _texts(contents, tokenizer), strict=True):
            yield Streams(*texts, content["values"])


@dataclass(frozen=True)
class TagEncoder(Encoder):
    """The words with spaces between them. Labels, one for each token: 1 + the tag's number where a word begins, else 0;
    a word that shares its first token with the one before it, or has none, has no label."""

    classes: tuple[str, ...]

    def encode(self, contents: Sequence[Content], tokenizer: TextTokenizer) -> Iterator[Streams]:
        """See the class."""
        number = {name: index for index, name in enumerate(self.classes, start=1)}
        found = tokenizer.encode_spans([" ".join(content["words"]) for _, content in contents])
        for (_, content), spanned in zip(contents, found, strict=True):
            labels, at = [0] * len(spanned.ids), 0
            for word, name in zip(content["words"], content["labels"], strict=True):
                token = covering(spanned, at, at + len(word))
                if token is not None and not labels[token[0]]:
                    labels[token[0]] = number[name]
                at += len(word) + 1
            yield Streams(spanned.ids, (), labels)


@dataclass(frozen=True)
class AnswerEncoder(Encoder):
    """The context, and the question as second text. Labels: the answer's first and last token in the context, or none
    where it has no answer."""

    def encode(self, contents: Sequence[Content], tokenizer: TextTokenizer) -> Iterator[Streams]:
        """See the class."""
        found = tokenizer.encode_spans([content["context"] for _, content in contents])
        questions = tokenizer.encode_batch([content["question"] for _, content in contents])
        for (place, content), spanned, question in zip(contents, found, questions, strict=True):
            span = content["span"] and covering(spanned, *content["span"])
            if content["span"] and not span:
                raise UserError(f"{place}: the tokenizer has no tokens for the answer: leave the example out")
            yield Streams(spanned.ids, question, span or ())


@dataclass(frozen=True)
class ChatEncoder(Encoder):
    """The whole conversation. Labels, one for each token: the number of the model's turn that it belongs to, from 1, or
    0, also in turns that are not to be learned."""

    template: str
    special_tokens: Mapping[str, str] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """The flags that are minded are a part of it."""
        return cache.key(super().key, FLAGS)

    def encode(self, contents: Sequence[Content], tokenizer: TextTokenizer) -> Iterator[Streams]:
        """See the class."""
        template = ChatTemplate(self.template, self.special_tokens)
        rendered = []
        for place, content in contents:
            try:
                rendered.append(_turns(template, content["messages"]))
            except UserError as error:
                raise UserError(f"{place}: {error}") from error
        found = tokenizer.encode_spans([text for text, _ in rendered], special=True)
        for (place, _), (_, turns), spanned in zip(contents, rendered, found, strict=True):
            labels = [0] * len(spanned.ids)
            for number, turn in turns.items():
                first, last = covering(spanned, *turn) or (0, -1)
                labels[first : last + 1] = [number] * (last + 1 - first)
            if not any(labels):
                raise UserError(
                    f"{place}: the chat template writes no words of the assistant: there is nothing to learn"
                )
            yield Streams(spanned.ids, (), labels)


def _turns(template: ChatTemplate, messages: Sequence[Message]) -> tuple[str, dict[int, tuple[int, int]]]:
    """The text of a conversation, and the characters of the turns that are learned, by number from 1."""
    learned = [is_learned(message) for message in messages if message["role"] == "assistant"]
    text, turns = template.turns([{k: v for k, v in message.items() if k not in FLAGS} for message in messages])
    if all(learned):
        return text, dict(enumerate(turns, start=1))
    if len(turns) != len(learned):
        raise UserError(
            f"the chat template marks {len(turns)} turns of {len(learned)} messages of the assistant, so those that "
            "are not to be learned cannot be told apart: mark each message in it with {% generation %}"
        )
    return text, {number: turn for number, turn in enumerate(turns, start=1) if learned[number - 1]}


@dataclass(frozen=True)
class PreferenceEncoder(Encoder):
    """The prompt with the end token that comes before a document, and both completions with the end token after each.
    Labels: how many tokens the chosen one has."""

    def encode(self, contents: Sequence[Content], tokenizer: TextTokenizer) -> Iterator[Streams]:
        """See the class."""
        prompts, chosen, rejected = (
            tokenizer.encode_batch([content[name] for _, content in contents])
            for name in ("prompt", "chosen", "rejected")
        )
        end = tokenizer.end_id
        for prompt, one, two in zip(prompts, chosen, rejected, strict=True):
            yield Streams([end, *prompt], [*one, end, *two, end], [len(one) + 1])


@dataclass(frozen=True)
class PreferredChatEncoder(ChatEncoder):
    """The conversation up to where the model's answer begins, and both answers as the template writes them. Labels: how
    many tokens the chosen one has."""

    def encode(self, contents: Sequence[Content], tokenizer: TextTokenizer) -> Iterator[Streams]:
        """See the class."""
        template = ChatTemplate(self.template, self.special_tokens)
        for place, content in contents:
            try:
                texts = _answers(template, content)
            except UserError as error:
                raise UserError(f"{place}: {error}") from error
            prompt, one, two = (spanned.ids for spanned in tokenizer.encode_spans(texts, special=True))
            yield Streams(prompt, [*one, *two], [len(one)])


def _answers(template: ChatTemplate, content: Mapping[str, Any]) -> list[str]:
    """The text of a conversation, and of the two ways to go on from there."""
    prompt = template.render(content["messages"])
    whole = [
        template.render([*content["messages"], *content[name]], add_generation_prompt=False)
        for name in ("chosen", "rejected")
    ]
    if not all(text.startswith(prompt) and len(text) > len(prompt) for text in whole):
        raise UserError("the chat template writes what comes before an answer in another way once it is there")
    return [prompt, *(text[len(prompt) :] for text in whole)]


def covering(spanned: Spanned, start: int, end: int) -> tuple[int, int] | None:
    """The first and the last token that stand for one of the characters [start, end); None if none does."""
    first = next((i for i, (a, b) in enumerate(spanned.spans) if b > start and a < end and b > a), None)
    if first is None:
        return None
    last = first
    while last + 1 < len(spanned.spans) and spanned.spans[last + 1][0] < end:
        last += 1
    return first, last


def encoder_of(
    source: Source, documents: Documents, classes: tuple[str, ...], tokenizer: TextTokenizer, wanted: Tokenizer
) -> Encoder | None:
    """The encoder of a source's documents; None where they are texts or pairs of texts.

    Raises:
      UserError: chats without a template.
    """
    if isinstance(source, PreferredChats):
        return PreferredChatEncoder(*chat_template(source, tokenizer, wanted))
    if isinstance(source, Chats | StdlibChats):
        return ChatEncoder(*chat_template(source, tokenizer, wanted))
    encoders = {"tags": TagEncoder(classes), "classes": ClassEncoder(classes)}
    others: dict[str, Encoder] = {
        "numbers": NumberEncoder(),
        "answers": AnswerEncoder(),
        "preferences": PreferenceEncoder(),
    }
    return (others | encoders).get(documents.kind)


def chat_template(
    source: Chats | StdlibChats, tokenizer: TextTokenizer, wanted: Tokenizer
) -> tuple[str, dict[str, str]]:
    """The text of the template of a source's chats, and the special tokens that it may name.

    Raises:
      UserError: there is none, or the tokenizer lacks its special tokens.
    """
    specials = dict(tokenizer.special_tokens)
    missing = [token for token in source.special_tokens if tokenizer.token_id(token) is None]
    if missing:
        raise UserError(
            f"the built-in chat template writes {' and '.join(missing)}, which the tokenizer does not have: use its "
            "own template, or TrainedBpe, which reserves them"
        )
    if source.template == CHATML_NAME:
        return CHATML, specials
    if source.template:
        path = Path(source.template).expanduser()
        if not path.is_file():
            raise UserError(f"there is no chat template {source.template!r}: give a Jinja file, or {CHATML_NAME!r}")
        return path.read_text(encoding="utf-8"), specials
    own = Path(wanted.path).expanduser() if isinstance(wanted, TokenizerFile) else None
    found = own and find_template(own if own.is_dir() else own.parent, specials)
    if not found:
        raise UserError(
            f"the tokenizer brings no chat template: set the template of Chats to {CHATML_NAME!r} or to a Jinja file"
        )
    return found.source, specials
