"""A trained model of the Python API: ``lmx.load(path)``."""

import dataclasses
import functools
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax

from lmx.data.chat import ChatTemplate, Message, check_messages
from lmx.data.tokenizer import Encoded, Text, TextTokenizer
from lmx.decode import forward, rows
from lmx.decode.defaults import Defaults
from lmx.decode.generate import Completion, Generator, Row, completed
from lmx.decode.sources import open_source
from lmx.errors import UserError
from lmx.experiment import Experiment
from lmx.models.config import ModelConfig
from lmx.models.model import Inputs, cast_floats, unstack_layers
from lmx.models.specs import ModelSpec
from lmx.nn.module import Params
from lmx.sharding.mesh import MeshConfig, build_mesh
from lmx.sharding.rules import Rules, Sharding, use_sharding


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
        return cast_floats(self.params, self.compute or self.params["embedding"]["table"].dtype)

    @functools.cached_property
    def generator(self) -> Generator:
        """The decoding form of the model: layers unstacked once.

        Raises:
          UserError: an encoder, a model that predicts no tokens, or one without a tokenizer.
        """
        if forward.is_encoder(self.spec):
            raise UserError(
                f"this {self.config.family} is an encoder and does not generate; call embed, scores or logits"
            )
        if self.spec.head is None:
            raise UserError(f"this {self.config.family} has no head that predicts tokens; call embed or scores")
        self.defaults.warn_unknown()
        stops = tuple(i for i in self.defaults.stops if 0 <= i < self.spec.vocab)
        ready = jax.jit(lambda p: unstack_layers(self.spec, p))(self._ready)
        return Generator(self.spec, ready, self._texts(), stops, encode=self._prompt)

    def tokenize(self, texts: Sequence[Text], *, around: bool = True) -> list[Encoded]:
        """The tokens of texts, or of pairs of them, as the model reads them: special tokens in the text are taken as
        such, and (``around``) those that the tokenizer puts around a text are there.

        Raises:
          UserError: there is no tokenizer, or a single string in place of a list.
        """
        if isinstance(texts, str):
            raise UserError("a single string was given in place of a list of texts; put it in a list")
        return self._texts().encode_prompts(list(texts), around=around)

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

    def stream(self, prompts: Sequence[str], *, seed: int | Sequence[int] = 0, **options: Any) -> Iterator[list[str]]:
        """As :meth:`generate`, but yields the text that each prompt has gained, as it comes.

        ``options`` are ``max_new_tokens``, ``stop`` and ``sampling`` (a Sampling).
        """
        for _, news in self.chunks(prompts, seed=seed, **options):
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
        check_messages(messages)
        if self.template is None:
            raise UserError("this model has no chat template; give generate a prompt, or take the model's chat version")
        return self.template.render(messages, **template_options)

    def _texts(self) -> TextTokenizer:
        if self.tokenizer is None:
            raise UserError(
                "this model has no tokenizer, so it takes tokens only; put its tokenizer.json (or tokenizer.model, "
                "spiece.model, vocab.txt) into its directory"
            )
        return self.tokenizer

    def _prompt(self, text: str) -> list[int]:
        """A prompt's tokens; nothing at all begins as any text does, and at least with the end of another."""
        first = self.defaults.tokens.get("bos", self._texts().end_id)
        return self.tokenize([text])[0].ids or [first]

    def _read(self, texts: Sequence[Text]) -> Inputs:
        return rows.of_texts(self.spec, self.tokenize(texts))

    def _run(self, function: Any, static: tuple[Any, ...], inputs: Inputs, *decoder: Inputs | None) -> jax.Array:
        """What a function of :mod:`lmx.decode.forward` gives for these rows."""
        both = (own and rows.divisible(own, self.sharding) for own in (inputs, *decoder))
        return function(self.spec, self.sharding, *static, self._ready, *both)[: len(inputs.tokens)]

    def chunks(
        self, prompts: Sequence[str], *, seed: int | Sequence[int] = 0, is_chat: bool = False, **options: Any
    ) -> Iterator[tuple[list[Row], list[str]]]:
        """Yields, as tokens come, the progress of each prompt and the text that it has gained.

        ``is_chat`` says that prompts are from :meth:`chat_text`, and have their special tokens already; ``options`` are
        those of :meth:`stream`.
        """
        if isinstance(prompts, str):
            raise UserError("prompts is a single string; give a list of strings")
        count, texts, seeds = len(prompts), list(prompts), list(_seeds(seed, prompts))
        more = 0 if self.sharding is None else -count % self.sharding.ways("act_batch")
        texts, seeds = texts + texts[-1:] * more, seeds + seeds[-1:] * more
        options = {"max_new_tokens": 64, "sampling": self.defaults.sampling, **options}
        generator = self.generator
        if is_chat:
            generator = dataclasses.replace(generator, encode=lambda text: self.tokenize([text], around=False)[0].ids)
        # The mesh divides the batch: prompts are repeated until it does, and only theirs are yielded.
        stream = generator.stream(texts, seeds=seeds, **options)
        while True:
            with use_sharding(self.sharding):  # not around the yield, where the caller's own code runs
                latest = next(stream, None)
            if latest is None:
                return
            yield latest[0][:count], latest[1][:count]


def _seeds(seed: int | Sequence[int], prompts: Sequence[str]) -> Sequence[int]:
    if isinstance(seed, int):
        return [seed + i for i in range(len(prompts))]
    if len(seed) != len(prompts):
        raise UserError(f"there are {len(seed)} seeds for {len(prompts)} prompts; give one each, or a single one")
    return seed


def load(
    path: str | os.PathLike[str],
    *,
    step: int | None = None,
    dtype: Any = None,
    mesh: MeshConfig | None = None,
    rules: Rules | None = None,
) -> Model:
    """The model in a directory.

    Args:
      path: a run directory (its averaged parameters if the run averaged them, else its parameters), a Hugging Face
        directory (``config.json``, safetensors and, for text, a tokenizer), or what ``lmx convert --to lmx`` made.
      step: of a run, the checkpoint's step; the newest good one by default.
      dtype: of the parameters and of the computation. By default they stay as stored, and a run's model computes in the
        run's dtype, another in that of its parameters.
      mesh: the devices to spread the model over; one device by default.
      rules: how the model's axes lie on the mesh; by default the run's, or lmx's own.

    Raises:
      UserError: no model there, no such checkpoint, or files that are missing, not whole, or do not fit each other.
      LmxError: every checkpoint is damaged.

    Warns:
      UserWarning: a tensor that holds NaN or infinite values, by name; settings that are passed over.
    """
    source = open_source(Path(path))
    own = source.experiment.rules if source.experiment else Rules()
    sharding = None if mesh is None else Sharding(build_mesh(mesh), rules or own)
    params, at = source.read(dtype, sharding, step)
    return Model(
        source.config,
        params,
        source.tokenizer,
        dtype or source.compute,
        at,
        source.experiment,
        source.defaults,
        source.template,
        sharding,
    )
