"""What was seen inside of a model, as JSON-ready data."""

import base64
from typing import Any

import numpy as np

from lmx.decode.loaded import Model
from lmx.inspect.look import Look

DIGITS = 6


def as_data(model: Model, seen: Look, name: str, text: str) -> dict[str, Any]:
    """Everything, by name.

    ``tokens`` (id and text), of an encoder-decoder ``source`` too; ``predictions``, each with the place and the token
    that it is about, its log-probability, rank (0: the likeliest) and entropy (nats), the likeliest tokens, the same by
    layer (``lens``), and its ``attribution``; ``attention`` by kind as [layers][heads][queries][keys].
    """
    return {
        "model": name,
        "step": model.step,
        "family": model.config.family,
        "text": text,
        "tokens": _tokens(model, seen.rows.tokens[0]),
        "source": None if seen.rows.source is None else _tokens(model, seen.rows.source[0]),
        "predictions": [_prediction(model, seen, i) for i in range(len(seen.targets))],
        "attention": {kind: _rounded(maps) for kind, maps in seen.attention.items()},
    }


def for_page(data: dict[str, Any], seen: Look) -> dict[str, Any]:
    """The same, with attention in steps of 1 / 255 as base64, which is what a page can show."""
    maps = {
        kind: {"shape": own.shape, "bytes": base64.b64encode(np.round(own * 255).astype(np.uint8).tobytes()).decode()}
        for kind, own in seen.attention.items()
    }
    return {**data, "attention": maps}


def _prediction(model: Model, seen: Look, index: int) -> dict[str, Any]:
    lens, source = seen.lens, seen.source_attribution
    layers = [
        {
            "logprob": _rounded(lens.logprob[layer, index]),
            "rank": int(lens.rank[layer, index]),
            "entropy": _rounded(lens.entropy[layer, index]),
            "top": [
                {**_token(model, token), "logprob": _rounded(logprob)}
                for token, logprob in zip(lens.top[layer, index], lens.top_logprob[layer, index], strict=True)
            ],
        }
        for layer in range(len(lens.logprob))
    ]
    return {
        "place": int(seen.rows.place[index]),
        "row": int(seen.rows.at[index]),
        "known": bool(seen.rows.targets[index] >= 0),
        "token": _token(model, seen.targets[index]),
        **layers[-1],
        "lens": layers,
        "attribution": _rounded(seen.attribution[index]),
        "source_attribution": None if source is None else _rounded(source[index]),
    }


def _tokens(model: Model, ids: np.ndarray) -> list[dict[str, Any]]:
    return [_token(model, token) for token in ids]


def _token(model: Model, token: Any) -> dict[str, Any]:
    """A token's id and its text; a special one is told by its id."""
    text = model.prompts.texts.decode([int(token)])
    return {"id": int(token), "text": text or f"<{int(token)}>"}


def _rounded(array: Any) -> Any:
    return np.round(np.asarray(array, np.float64), DIGITS).tolist()
