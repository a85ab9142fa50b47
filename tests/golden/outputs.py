"""What a reference model computes: one function for each kind of model, tensors of the batch in, arrays out."""

from typing import Any

import torch
from sizes import Sizes
from torch.nn.functional import cross_entropy

Model = torch.nn.Module
Tensors = dict[str, torch.Tensor]
Spans = list[tuple[int, int]]
SPECIAL = 3  # tokens below are padding, start and end


def draw_tokens(model: Model, length: int, spans: Spans, generator: torch.Generator) -> Tensors:
    """Rows of random tokens, each real in its span; no padding token is among the real ones."""
    pad = model.config.pad_token_id or 0
    vocab = model.config.vocab_size - (pad >= SPECIAL)  # Marian pads with the last token
    tokens = torch.randint(SPECIAL, vocab, (len(spans), length), generator=generator)
    at = torch.arange(length)
    segments = torch.stack([(at >= start) & (at < end) for start, end in spans]).int()
    positions = (segments.cumsum(-1) - 1).clamp(min=0)
    return {"tokens": tokens.where(segments > 0, pad), "segments": segments, "positions": positions}


def whole(s: Sizes) -> Spans:
    """Two rows without padding."""
    return [(0, s.length)] * 2


def left_and_right(s: Sizes) -> Spans:
    """Rows without padding, padded on the right, and padded on the left."""
    return [(0, s.length), (0, s.length - 5), (4, s.length)]


def right(s: Sizes) -> Spans:
    """Rows without padding and padded on the right."""
    return [(0, s.length), (0, s.length - 5), (0, s.length // 2)]


def decoder(model: Model, batch: Tensors) -> Tensors:
    """``logits``, and the mean next-token ``loss`` over pairs of real tokens."""
    logits = model(
        batch["tokens"], attention_mask=batch["segments"], position_ids=batch["positions"], use_cache=False
    ).logits
    loss = next_token_loss(logits, batch["tokens"], batch["segments"])
    return {"logits": real(logits, batch["segments"]), "loss": loss}


def encoder(model: Model, batch: Tensors) -> Tensors:
    """``hidden`` of the last layer, ``logits``, their mean ``loss``, and ``nsp`` and ``pooled`` if there are."""
    segments = batch["segments"]
    types = {"token_type_ids": batch["types"]} if "types" in batch else {}
    output = model(batch["tokens"], attention_mask=segments, **types)
    logits = output.prediction_logits if "prediction_logits" in output else output.logits
    hidden = model.base_model(batch["tokens"], attention_mask=segments, **types)
    found = {"hidden": real(hidden.last_hidden_state, segments), "logits": real(logits, segments)}
    if "seq_relationship_logits" in output:
        found |= {"nsp": output.seq_relationship_logits, "pooled": hidden.pooler_output}
    return found | {"loss": cross_entropy(logits[segments > 0], batch["tokens"][segments > 0])}


def encoder_decoder(model: Model, batch: Tensors) -> Tensors:
    """``hidden`` of the encoder, ``logits`` of the decoder and their mean next-token ``loss``."""
    output = model(
        batch["tokens"],
        attention_mask=batch["segments"],
        decoder_input_ids=batch["decoder_tokens"],
        decoder_attention_mask=batch["decoder_segments"],
        use_cache=False,
    )
    loss = next_token_loss(output.logits, batch["decoder_tokens"], batch["decoder_segments"])
    hidden = real(output.encoder_last_hidden_state, batch["segments"])
    return {"hidden": hidden, "logits": real(output.logits, batch["decoder_segments"]), "loss": loss}


def task(model: Model, batch: Tensors) -> Tensors:
    """``task``: logits [batch, class], [batch, length, class], or a span's start and end [batch, length, 2]."""
    output = model(batch["tokens"], attention_mask=batch["segments"])
    if "start_logits" in output:
        return {"task": real(torch.stack([output.start_logits, output.end_logits], -1), batch["segments"])}
    return {"task": real(output.logits, batch["segments"]) if output.logits.ndim == 3 else output.logits}


def next_token_loss(logits: torch.Tensor, tokens: torch.Tensor, segments: torch.Tensor) -> torch.Tensor:
    counts = (segments[:, :-1] * segments[:, 1:]) > 0
    return cross_entropy(logits[:, :-1][counts], tokens[:, 1:][counts])


def real(values: torch.Tensor, segments: torch.Tensor) -> torch.Tensor:
    """The values [batch, length, ...], zero at padding."""
    return values * segments[..., None]


def decoder_batch(model: Model, s: Sizes, generator: torch.Generator, spans: Any = left_and_right) -> Tensors:
    return draw_tokens(model, s.length, spans(s), generator)


def encoder_batch(model: Model, s: Sizes, generator: torch.Generator) -> Tensors:
    batch = draw_tokens(model, s.length, right(s), generator)
    if getattr(model.config, "type_vocab_size", 0) > 1:
        batch["types"] = (torch.arange(s.length) >= s.length // 3).int() * batch["segments"]
    return batch


def encoder_decoder_batch(model: Model, s: Sizes, generator: torch.Generator) -> Tensors:
    """Sources, and targets of another length that begin with the start token."""
    length = s.length - 4
    spans = [(0, length), (0, length), (0, length - 6)]
    target = draw_tokens(model, length, spans, generator)
    target["tokens"][:, 0] = model.config.decoder_start_token_id
    source = draw_tokens(model, s.length, right(s), generator)
    return source | {f"decoder_{name}": value for name, value in target.items()}


def task_batch(model: Model, s: Sizes, generator: torch.Generator) -> Tensors:
    """Rows that end with the end token, where BART classifies; its decoder reads the source, one token late."""
    batch = draw_tokens(model, s.length, right(s), generator)
    tokens = batch["tokens"]
    tokens[torch.arange(len(tokens)), batch["segments"].sum(-1) - 1] = model.config.eos_token_id
    if not model.config.is_encoder_decoder:
        return batch
    start = torch.full_like(tokens[:, :1], model.config.decoder_start_token_id)
    late = batch | {"tokens": torch.cat([start, tokens[:, :-1]], dim=1)}
    return batch | {f"decoder_{name}": value for name, value in late.items()}
