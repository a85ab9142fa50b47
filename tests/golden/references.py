"""Slow NumPy references, in float64 and straight from the papers, of the families that transformers lacks.

Every tensor is stored inputs first, ``y = x @ w``, with heads and head_dim joined. Names, with N the number of a layer:

PaLM (Chowdhery et al. 2022, sections 2 and 5)::

    embedding [vocab, width]     layers.N.norm.scale [width]     norm.scale [width]
    layers.N.query [width, heads, head_dim]   layers.N.out [heads, head_dim, width]
    layers.N.key, .value [width, head_dim]   layers.N.gate, .up [width, hidden]   layers.N.down [hidden, width]

"Attention Is All You Need" (Vaswani et al. 2017, section 3), S being ``encoder`` or ``decoder``, A ``attention`` or,
in the decoder too, ``cross``::

    embedding [vocab, width]     S.N.A_norm.scale, .bias [width]     S.N.mlp_norm.scale, .bias [width]
    S.N.A.query, .key, .value [width, heads, head_dim]     S.N.A.out [heads, head_dim, width]
    S.N.mlp.up [width, hidden]   S.N.mlp.up_bias [hidden]   S.N.mlp.down [hidden, width]   S.N.mlp.down_bias [width]
"""

import json
from collections.abc import Callable
from typing import Any

import numpy as np
from sizes import Sizes

Array = np.ndarray
Arrays = dict[str, np.ndarray]


def palm(s: Sizes) -> Arrays:
    """Both sublayers of a block read one LayerNorm of its input; queries share one key and value head; no biases."""
    draw = np.random.default_rng(s.seed)
    config = {
        "model_type": "palm",
        "vocab": s.vocab,
        "context": s.context,
        "layers": s.layers,
        "width": s.width,
        "heads": s.heads,
        "head_dim": s.head_dim,
        "hidden": s.hidden,
        "rope_theta": 500.0,
        "eps": 1e-3,
    }
    shapes = {"embedding": (s.vocab, s.width), "norm.scale": (s.width,)}
    for n in range(s.layers):
        shapes |= {
            f"layers.{n}.norm.scale": (s.width,),
            f"layers.{n}.query": (s.width, s.heads, s.head_dim),
            f"layers.{n}.key": (s.width, s.head_dim),
            f"layers.{n}.value": (s.width, s.head_dim),
            f"layers.{n}.out": (s.heads, s.head_dim, s.width),
            f"layers.{n}.gate": (s.width, s.hidden),
            f"layers.{n}.up": (s.width, s.hidden),
            f"layers.{n}.down": (s.hidden, s.width),
        }
    tensors = randomised(shapes, draw)
    batch = draw_batch(draw, s.vocab, s.length, [(0, s.length), (0, s.length - 5), (4, s.length)])
    logits = palm_logits(config, tensors, batch)
    loss = next_token_loss(logits, batch["tokens"], batch["segments"])
    return packed(config, tensors, batch, logits=logits * batch["segments"][..., None], loss=loss)


def palm_logits(config: dict[str, Any], w: Arrays, batch: Arrays) -> Array:
    """[batch, length, vocab], divided by the root of the width because the tables are one (section 5)."""
    seen = causal(batch["segments"])
    x = w["embedding"][batch["tokens"]]
    for n in range(config["layers"]):
        layer = {name.removeprefix(f"layers.{n}."): a for name, a in w.items() if name.startswith(f"layers.{n}.")}
        y = layer_norm(x, layer["norm.scale"], 0.0, config["eps"])
        x = x + palm_attention(layer, y, batch["positions"], seen, config["rope_theta"])
        gate = y @ layer["gate"]
        x = x + (gate / (1 + np.exp(-gate)) * (y @ layer["up"])) @ layer["down"]
    return layer_norm(x, w["norm.scale"], 0.0, config["eps"]) @ w["embedding"].T / np.sqrt(config["width"])


def palm_attention(w: Arrays, y: Array, positions: Array, seen: Array, theta: float) -> Array:
    query = np.einsum("blw,whd->bhld", y, w["query"])
    query = rotated(query, positions[:, None], theta)
    key = rotated(y @ w["key"], positions, theta)
    mixed = attend(query, np.repeat(key[:, None], query.shape[1], 1), (y @ w["value"])[:, None], seen)
    return np.einsum("bhld,hdw->blw", mixed, w["out"])


def rotated(x: Array, positions: Array, theta: float) -> Array:
    """Rotary positions (Su et al. 2021); element i turns with element i + head_dim / 2 of [..., length, head_dim]."""
    half = x.shape[-1] // 2
    angles = positions[..., None] * theta ** (-np.arange(half) / half)
    first, second = x[..., :half], x[..., half:]
    cos, sin = np.cos(angles), np.sin(angles)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def transformer(s: Sizes) -> Arrays:
    """Norms after the residual sum, sines and cosines interleaved, one table for both stacks and the output."""
    draw = np.random.default_rng(s.seed)
    config = {
        "model_type": "transformer",
        "vocab": s.vocab,
        "context": s.context,
        "layers": s.layers,
        "width": s.width,
        "heads": s.heads,
        "head_dim": s.width // s.heads,
        "hidden": s.hidden,
        "eps": 1e-6,
    }
    tensors = randomised(transformer_shapes(config), draw)
    length = s.length - 4
    batch = draw_batch(draw, s.vocab, s.length, [(0, s.length), (0, s.length - 5), (0, s.length // 2)])
    target = draw_batch(draw, s.vocab, length, [(0, length), (0, length), (0, length - 6)])
    target["tokens"][:, 0] = 1
    batch |= {f"decoder_{name}": a for name, a in target.items()}
    hidden = encoded(config, tensors, batch["tokens"], batch["segments"])
    logits = decoded(config, tensors, batch["decoder_tokens"], hidden, batch["segments"])
    loss = next_token_loss(logits, batch["decoder_tokens"], batch["decoder_segments"])
    hidden, logits = hidden * batch["segments"][..., None], logits * batch["decoder_segments"][..., None]
    return packed(config, tensors, batch, hidden=hidden, logits=logits, loss=loss)


def transformer_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    width, hidden = config["width"], config["hidden"]
    projection = (width, config["heads"], config["head_dim"])
    shapes: dict[str, tuple[int, ...]] = {"embedding": (config["vocab"], width)}
    for stack, attentions in {"encoder": ["attention"], "decoder": ["attention", "cross"]}.items():
        for at in [f"{stack}.{n}." for n in range(config["layers"])]:
            for name in attentions:
                shapes |= {f"{at}{name}.{part}": projection for part in ("query", "key", "value")}
                shapes |= {f"{at}{name}.out": (*projection[1:], width)}
            shapes |= {f"{at}mlp.up": (width, hidden), f"{at}mlp.up_bias": (hidden,)}
            shapes |= {f"{at}mlp.down": (hidden, width), f"{at}mlp.down_bias": (width,)}
            for name in [*attentions, "mlp"]:
                shapes |= {f"{at}{name}_norm.{part}": (width,) for part in ("scale", "bias")}
    return shapes


def encoded(config: dict[str, Any], w: Arrays, tokens: Array, segments: Array) -> Array:
    seen = segments[:, None, None, :] > 0
    x = embedded(w["embedding"], tokens)
    for at in [f"encoder.{n}." for n in range(config["layers"])]:
        x = added(w, at + "attention", x, attention(w, at + "attention", x, x, seen), config["eps"])
        x = added(w, at + "mlp", x, relu_mlp(w, at + "mlp", x), config["eps"])
    return x


def decoded(config: dict[str, Any], w: Arrays, tokens: Array, memory: Array, segments: Array) -> Array:
    seen, seen_memory = causal(np.ones_like(tokens)), segments[:, None, None, :] > 0
    x = embedded(w["embedding"], tokens)
    for at in [f"decoder.{n}." for n in range(config["layers"])]:
        x = added(w, at + "attention", x, attention(w, at + "attention", x, x, seen), config["eps"])
        x = added(w, at + "cross", x, attention(w, at + "cross", x, memory, seen_memory), config["eps"])
        x = added(w, at + "mlp", x, relu_mlp(w, at + "mlp", x), config["eps"])
    return x @ w["embedding"].T


def embedded(table: Array, tokens: Array) -> Array:
    """Section 3.4 and 3.5: sin(position / 10000^(2i/width)) in column 2i, the cosine in column 2i + 1."""
    width = table.shape[1]
    angles = np.arange(tokens.shape[1])[:, None] / 10_000 ** (np.arange(0, width, 2) / width)
    positions = np.stack([np.sin(angles), np.cos(angles)], axis=-1).reshape(-1, width)
    return table[tokens] * np.sqrt(width) + positions


def attention(w: Arrays, at: str, x: Array, memory: Array, seen: Array) -> Array:
    query = np.einsum("blw,whd->bhld", x, w[at + ".query"])
    key, value = (np.einsum("blw,whd->bhld", memory, w[f"{at}.{name}"]) for name in ("key", "value"))
    return np.einsum("bhld,hdw->blw", attend(query, key, value, seen), w[at + ".out"])


def relu_mlp(w: Arrays, at: str, x: Array) -> Array:
    return np.maximum(x @ w[at + ".up"] + w[at + ".up_bias"], 0) @ w[at + ".down"] + w[at + ".down_bias"]


def added(w: Arrays, at: str, x: Array, y: Array, eps: float) -> Array:
    return layer_norm(x + y, w[at + "_norm.scale"], w[at + "_norm.bias"], eps)


def layer_norm(x: Array, scale: Array, bias: Array | float, eps: float) -> Array:
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + eps) * scale + bias


def attend(query: Array, key: Array, value: Array, seen: Array) -> Array:
    """softmax(query key^T / sqrt(head_dim)) value of [batch, head, length, head_dim]; seen is [.., query, key]."""
    scores = np.einsum("bhqd,bhkd->bhqk", query, key) / np.sqrt(query.shape[-1])
    scores = np.where(seen, scores, -1e30)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True) @ value


def causal(segments: Array) -> Array:
    """[batch, 1, query, key]: what is real and not later."""
    at = np.arange(segments.shape[1])
    return (at[:, None] >= at) & (segments[:, None, None, :] > 0)


def next_token_loss(logits: Array, tokens: Array, segments: Array) -> Array:
    shifted = logits - logits.max(-1, keepdims=True)
    log_probs = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    picked = np.take_along_axis(log_probs[:, :-1], tokens[:, 1:, None], -1)[..., 0]
    return -picked[segments[:, :-1] * segments[:, 1:] > 0].mean()


def randomised(shapes: dict[str, tuple[int, ...]], draw: np.random.Generator) -> Arrays:
    """Multiples of 1/16, as those of the other files."""
    return {
        name: np.round(16 * (name.endswith("scale") + 0.2 * draw.standard_normal(shape))) / 16
        for name, shape in shapes.items()
    }


def draw_batch(draw: np.random.Generator, vocab: int, length: int, spans: list[tuple[int, int]]) -> Arrays:
    """Rows of random tokens, each real in its span; token 0 pads."""
    at = np.arange(length)
    segments = np.stack([(at >= start) & (at < end) for start, end in spans]).astype(int)
    tokens = draw.integers(3, vocab, segments.shape) * segments
    return {"tokens": tokens, "segments": segments, "positions": np.maximum(segments.cumsum(-1) - 1, 0)}


def packed(config: dict[str, Any], tensors: Arrays, batch: Arrays, **outputs: Array) -> Arrays:
    return {
        "config": np.array(json.dumps(config, indent=2)),
        **{name: a.astype(np.int32) for name, a in batch.items()},
        **{name: np.asarray(a, np.float32) for name, a in outputs.items()},
        **{f"tensor:{name}": matrix(name, a).astype(np.float32) for name, a in tensors.items()},
    }


def matrix(name: str, a: Array) -> Array:
    """How a tensor is stored: heads and head_dim joined, as checkpoints have them."""
    return a if a.ndim < 3 else a.reshape(-1, a.shape[-1]) if name.endswith(".out") else a.reshape(a.shape[0], -1)


MODELS: dict[str, Callable[[Sizes], Arrays]] = {"palm": palm, "transformer": transformer}
