"""How texts become what a model reads: its tokenizer, what it expects around a text, its chat template."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lmx.data.chat import ChatTemplate, Message, check_messages
from lmx.data.tokenizer import Encoded, Text, TextTokenizer
from lmx.errors import UserError


@dataclass(frozen=True)
class Prompts:
    """A model's way with texts.

    Attributes:
      tokenizer: text <-> tokens; None where there is none.
      special: ids of special tokens by what they do ("bos", ...), as the model's files say.
      template: of its chats, if it has one.
      bare: whether a prompt has nothing around it, being the beginning of what the model learned to go on with.
    """

    tokenizer: TextTokenizer | None = None
    special: Mapping[str, int] = field(default_factory=dict)
    template: ChatTemplate | None = None
    bare: bool = False

    @property
    def texts(self) -> TextTokenizer:
        """The tokenizer. Raises UserError where there is none."""
        if self.tokenizer is None:
            raise UserError(
                "this model has no tokenizer, so it takes tokens only; put its tokenizer.json (or tokenizer.model, "
                "spiece.model, vocab.txt) into its directory"
            )
        return self.tokenizer

    def tokenize(self, texts: Sequence[Text], *, around: bool = True) -> list[Encoded]:
        """The tokens of texts, or of pairs of them: see :meth:`lmx.decode.loaded.Model.tokenize`."""
        if isinstance(texts, str):
            raise UserError("a single string was given in place of a list of texts; put it in a list")
        return self.texts.encode_prompts(list(texts), around=around)

    def encode(self, text: str) -> list[int]:
        """A prompt's tokens; nothing at all begins as any text does, and at least with the end of another."""
        first = self.special.get("bos", self.texts.end_id)
        return self.tokenize([text], around=not self.bare)[0].ids or [first]

    def encode_chat(self, text: str) -> list[int]:
        """The tokens of :meth:`chat`, whose text has its special tokens already."""
        return self.tokenize([text], around=False)[0].ids

    def chat(self, messages: Sequence[Message], options: Mapping[str, Any]) -> str:
        """The text of a conversation up to where the model's answer begins.

        Raises:
          UserError: a model without a chat template, or messages that the template refuses.
        """
        check_messages(messages)
        if self.template is None:
            raise UserError("this model has no chat template; give generate a prompt, or take the model's chat version")
        return self.template.render(messages, **options)


def seeds_of(seed: int | Sequence[int], prompts: Sequence[str]) -> Sequence[int]:
    """A seed for each prompt. Raises UserError for a list of another length, or prompts that are a single string."""
    if isinstance(prompts, str):
        raise UserError("prompts is a single string; give a list of strings")
    if isinstance(seed, int):
        return [seed + i for i in range(len(prompts))]
    if len(seed) != len(prompts):
        raise UserError(f"there are {len(seed)} seeds for {len(prompts)} prompts; give one each, or a single one")
    return seed
