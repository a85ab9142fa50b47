"""Chat templates: the Jinja template that a model ships, which turns messages into the text it was trained on."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lmx.data.tokenizer import SETTINGS, TextTokenizer
from lmx.data.tokenizer_files import read_settings
from lmx.errors import UserError

TEMPLATE = "chat_template.jinja"
CHATML = """{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}
{%- if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}
{%- else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
"""A simple template, for tokenizers that bring none."""
Message = Mapping[str, Any]
"""``{"role": "user", "content": "..."}``, and whatever else the template reads."""
FLAGS = ("train", "weight")
"""What a message of the assistant may have to say whether it is learned: true or false, 1 or 0."""


@dataclass(frozen=True)
class ChatTemplate:
    """A template with the special tokens that it may name.

    Attributes:
      source: Jinja, which comes with a downloaded model: it runs in a sandbox that changes nothing outside.
      special_tokens: by the template's names for them: ``bos_token``, ``eos_token``, ...
    """

    source: str
    special_tokens: Mapping[str, str] = field(default_factory=dict)

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = True, **options: Any) -> str:
        """The text of a conversation, special tokens included.

        Args:
          messages: in order.
          add_generation_prompt: whether the text ends where the model's answer begins.
          options: what else the template reads: ``tools``, ``documents``, ``enable_thinking``, ...

        Raises:
          UserError: messages that are none, or that the template refuses; or a template that is not valid.
        """
        from lmx.data.chat_jinja import compiled  # few commands meet a template

        names = {"tools": None, "documents": None, **self.special_tokens, **options}
        try:
            return compiled(self.source).render(
                messages=plain(messages), add_generation_prompt=add_generation_prompt, **plain(names)
            )
        except Exception as error:  # a template computes, and may fail as any program may
            raise UserError(f"the chat template does not take these messages: {error}") from error

    def turns(self, messages: Sequence[Message]) -> tuple[str, list[tuple[int, int]]]:
        """The text of a whole conversation, and the characters [start, end) of each of the model's turns in it.

        They are what the template marks with ``{% generation %}``; of one without marks, what each message of the
        assistant adds to the text before it that ends with the generation prompt.

        Raises:
          UserError: as :meth:`render`; or a template without marks that writes a turn otherwise once others follow.
        """
        if re.search(r"\{%-?\s*generation\b", self.source):
            return self._marked(messages)
        text = self.render(messages, add_generation_prompt=False)
        spans = []
        for index, message in enumerate(messages):
            if message["role"] == "assistant":
                before = self.render(messages[:index])
                after = self.render(messages[: index + 1], add_generation_prompt=False)
                if not (after.startswith(before) and text.startswith(after)):
                    raise UserError(
                        f"the chat template writes message {index + 1} otherwise when it is followed or asked for, "
                        "so the model's own words cannot be found: mark them in it with {% generation %}"
                    )
                spans.append((len(before), len(after)))
        return text, spans

    def _marked(self, messages: Sequence[Message]) -> tuple[str, list[tuple[int, int]]]:
        from lmx.data.chat_jinja import MARKS

        begin, end = MARKS.values()
        marked = self.render(messages, add_generation_prompt=False, **MARKS)
        text, spans = "", list[tuple[int, int]]()
        for index, part in enumerate(marked.split(begin)):
            own, found, rest = part.partition(end)
            if index and found:
                spans.append((len(text), len(text) + len(own)))
            text += own + rest
        if text != self.render(messages, add_generation_prompt=False):
            raise UserError("the chat template changes what it marks with {% generation %}, so it cannot be found")
        return text, spans

    def turn_end(self, tokenizer: TextTokenizer) -> int | None:
        """The special token that ends the model's turns; None if none does."""
        text, spans = self.turns([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])
        rest = text[text.rindex("b", 0, spans[-1][1]) + 1 :] if spans and "b" in text[slice(*spans[-1])] else ""
        first = tokenizer.encode_prompts([rest], around=False)[0].ids[:1] if rest.strip() else []
        return first[0] if first and not tokenizer.decode(first) else None


def find_template(directory: Path, special_tokens: Mapping[str, str]) -> ChatTemplate | None:
    """The template of a directory: ``chat_template.jinja``, or an entry of ``tokenizer_config.json``."""
    if (directory / TEMPLATE).is_file():
        return ChatTemplate((directory / TEMPLATE).read_text(encoding="utf-8"), special_tokens)
    source = read_settings(directory).get("chat_template")
    if isinstance(source, list):  # several, by name
        source = next((t["template"] for t in source if t["name"] == "default"), None)
    if source is not None and not isinstance(source, str):
        raise UserError(f"{directory / SETTINGS} has a chat_template that is no text; download it again")
    return None if source is None else ChatTemplate(source, special_tokens)


def check_messages(messages: Any) -> None:
    """Raises UserError unless these are messages: mappings with a role, at least one."""
    is_list = isinstance(messages, Sequence) and not isinstance(messages, str)
    if not is_list or not messages or not all(isinstance(m, Mapping) and "role" in m for m in messages):
        raise UserError('messages must be a list such as [{"role": "user", "content": "Hello"}], and not empty')


def is_learned(message: Message) -> bool:
    """Whether a message is to be learned: all of the assistant's are, but those that have ``"train": false`` or
    ``"weight": 0``.

    Raises:
      UserError: it has another value, both that differ, or is of another role and should be.
    """
    given = {name: message[name] for name in FLAGS if message.get(name) is not None}
    if any(value not in (0, 1) for value in given.values()) or len(set(given.values())) > 1:
        raise UserError(
            f'a message has {json.dumps(given)}, expected "train" true or false, or "weight" 1 or 0, and both alike'
        )
    own = message["role"] == "assistant"
    if any(given.values()) and not own:
        raise UserError(
            f"a message of the role {message['role']!r} has {json.dumps(given)}, but only the assistant's are learned: "
            "remove it"
        )
    return own and all(given.values())


def plain(value: Any) -> Any:
    """JSON-like data rebuilt from exact built-in types, so that a template meets no method of a richer object.

    Raises:
      TypeError: something else.
    """
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    raise TypeError(f"{value!r} is a {type(value).__name__}, expected text, numbers, lists and mappings")
