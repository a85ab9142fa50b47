"""A trained model of the Python API: what ``lmx.load(path)`` gives."""

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import jax
import jax.numpy as jnp

from lmx.data.chat import ChatTemplate, Message
from lmx.data.tokenizer import Encoded, Text, TextTokenizer
from lmx.decode import forward, rows
from lmx.decode.classified import Classified, classified, numbered
from lmx.decode.defaults import Defaults
from lmx.decode.generate import Completion, Generator, Row, completed
from lmx.decode.pace import LIVE
from lmx.decode.places import Places, unstacker
from lmx.decode.prompts import Prompts, seeds_of
from lmx.errors import UserError
from lmx.experiment import Experiment
from lmx.models.config import ModelConfig
from lmx.models.model import Inputs, cast_floats
from lmx.models.specs import ModelSpec
from lmx.nn.module import Params
from lmx.sharding.rules import Rules, Sharding


@dataclass(frozen=True)
class Model:
    """A trained model.

    Attributes:
      config: its sizes.
      params: as stored, layers stacked.
      tokenizer: text <-> tokens; None where there is none, and only tokens are taken.
      compute: the dtype to compute in; None is that of the embedding table.
      step: the checkpoint's step; 0 of a model that is no run's.
      experiment: the run that it comes from, if it does.
      defaults: how it is meant to be decoded: what :meth:`generate` does unless it is told otherwise.
      template: of its chats, if it has one.
      sharding: the mesh that it lies on; None is a single device.
      reading: on a mesh, the rules of activations while prompts are read; None: the same as while tokens are written.
      classes: the names of the outputs of a head for classes, in order; none of other heads.
      several: whether any number of them may hold of a text.
    """

    config: ModelConfig
    params: Params
    tokenizer: TextTokenizer | None = None
    compute: Any = None
    step: int = 0
    experiment: Experiment | None = None
    defaults: Defaults = field(default_factory=Defaults)
    template: ChatTemplate | None = None
    sharding: Sharding | None = None
    reading: Rules | None = None
    classes: tuple[str, ...] = ()
    several: bool = False

    @functools.cached_property
    def spec(self) -> ModelSpec:
        """The model's shape; an encoder-decoder starts with the token that its defaults name."""
        spec, start = self.config.spec(), self.defaults.tokens.get("decoder_start")
        if spec.encoder is None or start is None:
            return spec
        return dataclasses.replace(spec, encoder=dataclasses.replace(spec.encoder, decoder_start=start))

    @functools.cached_property
    def _ready(self) -> Params:
        """The parameters in the dtype to compute in."""
        return cast(Params, cast_floats(self.params, self._dtype))

    @property
    def _dtype(self) -> Any:
        return self.compute or self.params["embedding"]["table"].dtype

    @functools.cached_property
    def prompts(self) -> Prompts:
        """How texts become what it reads."""
        return Prompts(self.tokenizer, self.defaults.tokens, self.template, bare=self._is_bare)

    @property
    def reads_prefix(self) -> bool:
        """Whether it is a decoder that learned to see all of a prompt at once."""
        run = self.experiment
        return run is not None and self.spec.encoder is None and run.objective.reads_prefix

    @property
    def _is_bare(self) -> bool:
        """Whether its prompts have no end token around."""
        return self.reads_prefix and self.experiment is not None and not self.experiment.objective.ends_source

    @functools.cached_property
    def generator(self) -> Generator:
        """The decoding form of the model: layers unstacked once, each device holding its part.

        Raises:
          UserError: an encoder, a model that predicts no tokens, or one without a tokenizer; a mesh that does not
            divide it.
        """
        if forward.is_encoder(self.spec):
            raise UserError(
                f"this {self.config.family} is an encoder and does not generate; call embed, scores or logits"
            )
        if self.spec.head is None:
            raise UserError(f"this {self.config.family} has no head that predicts tokens; call embed or scores")
        self.defaults.warn_unknown()
        texts, encode = self.prompts.texts, self.prompts.encode
        stops = tuple(i for i in self.defaults.stops if 0 <= i < self.spec.vocab)
        places = None if self.sharding is None else Places.of(self.sharding, self.reading)
        params = unstacker(self.spec, jnp.dtype(self._dtype), places)(self.params)
        return Generator(self.spec, params, texts, stops, encode=encode, prefix=self.reads_prefix, places=places)

    def tokenize(self, texts: Sequence[Text], *, around: bool = True) -> list[Encoded]:
        """The tokens of texts, or of pairs of them, as the model reads them: special tokens in the text are taken as
        such, and (``around``) those that the tokenizer puts around a text are there.

        Raises:
          UserError: there is no tokenizer, or a single string in place of a list.
        """
        return self.prompts.tokenize(texts, around=around)

    def logits(self, tokens: Any, decoder_tokens: Any = None) -> jax.Array:
        """Float32 [batch, length, vocab] of int32 tokens [batch, length], each row one text without padding.

        Of an encoder-decoder, ``tokens`` are the encoder's, and the logits stand at ``decoder_tokens`` [batch, length].

        Raises:
          UserError: tokens that are not a [batch, length] array of the vocabulary, or rows beyond the context; a model
            that predicts no tokens; decoder tokens where there is no decoder, or none where there is one.
        """
        if self.spec.head is None:
            raise UserError(f"this {self.config.family} has no head that predicts tokens; call embed or scores")
        inputs, decoder = rows.of_tokens(self.spec, tokens, decoder_tokens)
        if self.spec.encoder is not None and decoder is None:
            raise UserError("this is an encoder-decoder: give logits(tokens, decoder_tokens)")
        return self._run(forward.token_logits, (), inputs, decoder)

    def scores(self, inputs: Any, decoder_tokens: Any = None) -> jax.Array:
        """What the model's task head says: float32 [batch, classes] of a classifier of texts, [batch, length, classes]
        of one of tokens, [batch, length, 2] (start and end) of one that finds answers.

        Args:
          inputs: texts, pairs of texts, or int32 tokens [batch, length] without padding. The tokens of texts are those
            of :meth:`tokenize`, and scores beyond a text's last token mean nothing.
          decoder_tokens: an encoder-decoder's; by default, as such models classify, the inputs one token late.

        Raises:
          UserError: a model without such a head, or inputs as for :meth:`logits`.
        """
        heads = [head.name for head in self.spec.tasks if head.name != forward.POOLED]
        if not heads:
            raise UserError(f"this {self.config.family} has no task head ({self.config.task}); call logits or embed")
        own, decoder = (
            (self._read(inputs), None) if rows.are_texts(inputs) else rows.of_tokens(self.spec, inputs, decoder_tokens)
        )
        if self.spec.encoder is not None and decoder is None:
            decoder = rows.shifted(own, self.spec.encoder.decoder_start)
        return self._run(forward.task_scores, (heads[0],), own, decoder)

    def classify(self, texts: Sequence[Text]) -> list[Classified]:
        """The class of each text, or pair of texts, with the probabilities of all classes by name (LABEL_0, ... where
        the model has no names for them); all classes that hold of it, where any number of them may.

        Raises:
          UserError: a model without a head for the classes of texts.
        """
        if self.config.task != "sequence_classification":
            raise UserError(
                f"this {self.config.family} has no head for the classes of texts (model.task is {self.config.task!r}); "
                "call scores"
            )
        names = self.classes or numbered(self.config.classes)
        return classified(self.scores(texts), names, several=self.several)

    def embed(self, texts: Any) -> jax.Array:
        """Float32 [batch, embed]: the model's own pooled embedding if it has one (BERT's pooler), else the mean over
        each text's tokens of the hidden states after the final norm (of an encoder-decoder, its encoder's).

        ``texts`` are texts, pairs of texts, or int32 tokens [batch, length] without padding.

        Raises:
          UserError: there is no tokenizer, or a text is longer than the context.
        """
        inputs = self._read(texts) if rows.are_texts(texts) else rows.of_tokens(self.spec, texts)[0]
        return self._run(forward.embedding, (), inputs)

    def generate(
        self,
        prompts: Sequence[str],
        *,
        max_new_tokens: int = 64,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float | None = None,
        stop: Sequence[str] = (),
        seed: int | Sequence[int] = 0,
    ) -> list[Completion]:
        """Continues each prompt; see :class:`lmx.decode.sampling.Sampling` for what the numbers mean.

        Those that are not given are the model's own (``model.defaults.sampling``, from ``generation_config.json``).
        ``seed`` is one for each prompt, or a single one from which prompt i takes seed + i: what a prompt draws does
        not depend on which others are in the batch.
        """
        sampling = self.defaults.with_options(
            temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=repetition_penalty
        )
        options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "sampling": sampling, "stop": stop}
        return completed(list(self.chunks(prompts, seed=seed, **options))[-1][0])

    def stream(
        self,
        prompts: Sequence[str],
        *,
        max_new_tokens: int = 64,
        stop: Sequence[str] = (),
        seed: int | Sequence[int] = 0,
        **sampling: float | None,
    ) -> Iterator[list[str]]:
        """As :meth:`generate`, with the same options, but yields the text that each prompt has gained, as it comes."""
        drawn = self.defaults.with_options(**sampling)
        options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "sampling": drawn, "stop": stop}
        for _, news in self.chunks(prompts, seed=seed, pace=LIVE, **options):
            yield news

    def chat(
        self,
        messages: Sequence[Message],
        *,
        template_options: Mapping[str, Any] | None = None,
        seed: int = 0,
        max_new_tokens: int = 256,
        stop: Sequence[str] = (),
        **sampling: Any,
    ) -> Completion:
        """The model's answer to a conversation, ``[{"role": "user", "content": "Hello"}, ...]``.

        Args:
          messages: in order.
          template_options: what else the chat template reads, as ``tools`` or ``enable_thinking``.
          seed: of the draws.
          max_new_tokens: of the answer, at most.
          stop: strings that end it.
          sampling: as :meth:`generate`'s: ``temperature``, ``top_k``, ...

        Raises:
          UserError: a model without a chat template, or messages that the template refuses.
        """
        drawn = self.defaults.with_options(**sampling)
        options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "sampling": drawn, "stop": stop}
        text = self.chat_text(messages, **(template_options or {}))
        return completed(list(self.chunks([text], is_chat=True, seed=seed, **options))[-1][0])[0]

    def chat_text(self, messages: Sequence[Message], **template_options: Any) -> str:
        """The text of a conversation as the model was trained on it, up to where its answer begins."""
        return self.prompts.chat(messages, template_options)

    def _read(self, texts: Sequence[Text]) -> Inputs:
        return rows.of_texts(self.spec, self.tokenize(texts))

    def _run(self, function: Any, static: tuple[Any, ...], inputs: Inputs, *decoder: Inputs | None) -> jax.Array:
        """What a function of :mod:`lmx.decode.forward` gives for these rows."""
        count, length = (decoder[0] if decoder and decoder[0] is not None else inputs).tokens.shape
        both = (own and rows.divisible(own, self.sharding) for own in (inputs, *decoder))
        out = function(self.spec, self.sharding, *static, self._ready, *both)
        out = out if self.sharding is None else self.sharding.whole(out)
        return cast(jax.Array, out[:count, :length] if out.ndim == 3 else out[:count])

    def chunks(
        self, prompts: Sequence[str], *, seed: int | Sequence[int] = 0, is_chat: bool = False, **options: Any
    ) -> Iterator[tuple[list[Row], list[str]]]:
        """Yields, as tokens come, the progress of each prompt and the text that it has gained.

        ``is_chat`` says that prompts are from :meth:`chat_text`, and have their special tokens already; ``options`` are
        those of :meth:`lmx.decode.generate.Generator.stream`.
        """
        options = {"max_new_tokens": 64, "sampling": self.defaults.sampling, **options}
        seeds, generator = seeds_of(seed, prompts), self.generator
        if is_chat:
            generator = dataclasses.replace(generator, encode=self.prompts.encode_chat)
        yield from generator.stream(prompts, seeds=seeds, **options)
