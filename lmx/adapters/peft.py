"""Adapters in the form of Hugging Face's PEFT: ``adapter_config.json`` and ``adapter_model.safetensors``."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import unflatten_dict

from lmx.adapters.adapter import LEAVES, Dora, Lora
from lmx.checkpoint.huggingface.export import write_json
from lmx.checkpoint.huggingface.files import read_header, write_file
from lmx.checkpoint.huggingface.plan import Holder, flat, make_plan
from lmx.checkpoint.huggingface.tensors import InFiles, read_json, some
from lmx.errors import LmxError, UserError
from lmx.models.config import ModelConfig
from lmx.nn.module import Params

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
OTHERS = (
    *("layer_replication", "trainable_token_indices", "use_qalora", "lora_bias", "target_parameters", "kasa_config"),
    *("modules_to_save", "use_bdlora", "arrow_config", "alora_invocation_tokens", "velora_config", "monteclora_config"),
)
"""Entries of PEFT's configuration that change what is computed, and that are not read here."""
TASKS = {"token_prediction": "CAUSAL_LM", "sequence_classification": "SEQ_CLS", "token_classification": "TOKEN_CLS"}


Arrays = dict[str, np.ndarray]
"""An adapter's: ``a``, ``b`` and DoRA's ``magnitude``."""


@dataclass(frozen=True)
class Module:
    """A linear module that has an adapter: one tensor of the base, and the parameters side by side in it.

    Attributes:
      name: the module's, as transformers has it.
      holder: the base's tensor.
      own: for each of the tensor's parameters its adapter's arrays of this layer, or None where it has none.
    """

    name: str
    holder: Holder
    own: tuple[Arrays | None, ...]

    @property
    def rank(self) -> int:
        """Of all of its parameters' adapters together."""
        return sum(own["a"].shape[-1] for own in self.own if own)

    def tensors(self) -> dict[str, np.ndarray]:
        """PEFT's own: A [rank, inputs], B [outputs, rank], and DoRA's lengths [outputs].

        Parameters that lie side by side in a tensor have blocks of the rank each.
        """
        a = [own["a"].reshape(-1, own["a"].shape[-1]).T for own in self.own if own]
        b = [self._columns(i, own["b"]) for i, own in enumerate(self.own) if own]
        found = {"lora_A.weight": np.concatenate(a), "lora_B.weight": np.concatenate(b, axis=1)}
        lengths = [own["magnitude"] for own in self.own if own and "magnitude" in own]
        if lengths:
            if len(lengths) < len(self.own):
                raise UserError(
                    f"PEFT has one adapter for {self.name}, but DoRA was trained on a part of it; name all of its "
                    "parts in adapter.targets"
                )
            found["lora_magnitude_vector"] = replace(self.holder.stored, split=None).join(lengths)
        return {f"{PREFIX}{self.name}.{name}": np.ascontiguousarray(array) for name, array in found.items()}

    def _columns(self, which: int, b: np.ndarray) -> np.ndarray:
        """[outputs of the tensor, rank] of one parameter's b, with zeros for its neighbours."""
        shapes = [(b.shape[0], *_outputs(self.holder, i)) for i in range(len(self.own))]
        stored = replace(self.holder.stored, split=1)
        joined = stored.join([b if i == which else np.zeros(shape, b.dtype) for i, shape in enumerate(shapes)])
        return joined if stored.transposed else joined.T


def write_peft(config: ModelConfig, adapter: Lora, own: Params, base: str, directory: Path) -> dict[str, float]:
    """Writes what a run trained as PEFT reads it, and reads it back.

    Args:
      config: the model's.
      adapter: the run's.
      own: what was trained, as a checkpoint has it.
      base: what PEFT is told of the base model.
      directory: where, an empty one.

    Returns:
      By what was compared, the largest difference between the updates of the base's tensors that were to be written and
      those that were.

    Raises:
      UserError: adapters of experts, or parameters trained in full, which have no such form here.
      LmxError: what was read back is not what was written.
    """
    modules = list(_modules(config, own))
    tensors = {name: array for module in modules for name, array in module.tensors().items()}
    infos = {name: jax.ShapeDtypeStruct(array.shape, array.dtype) for name, array in tensors.items()}
    write_file(directory / WEIGHTS, infos, lambda name: tensors[name])
    write_json(directory / CONFIG, _config(config, adapter, modules, base))
    again = dict(_updates(directory))
    worst = 0.0
    for module in modules:
        expected = module.tensors()
        a, b = (expected[f"{PREFIX}{module.name}.lora_{part}.weight"] for part in "AB")
        worst = max(worst, float(np.max(np.abs(adapter.scale * _product(b, a) - again[module.name]))))
    if not worst <= 1e-6:
        raise LmxError(f"the adapter that was written to {directory} differs by {worst:.2g} from the run's")
    return {"updates": worst}


def read_peft(config: ModelConfig, adapter: Lora, directory: Path) -> Params:
    """The arrays of an adapter in PEFT's form, float32, as a run with ``adapter`` trains them.

    A smaller rank is filled up with zeros, and another alpha goes into b.

    Raises:
      UserError: no adapter there, one of a kind that is not LoRA or DoRA, of a larger rank, or for other parameters.
    """
    content, tensors = _open(directory)
    kind = Dora if content.get("use_dora") else Lora
    if type(adapter) is not kind:
        raise UserError(f"{directory} is a {kind.__name__}, but the recipe's adapter is a {type(adapter).__name__}")
    found: dict[str, dict[tuple[int, ...], Arrays]] = {}
    used: set[str] = set()
    for holder in make_plan(config).holders.values():
        name = holder.name.removesuffix(".weight")
        keys = {part: f"{PREFIX}{name}.{part}" for part in ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector")}
        if keys["lora_A.weight"] not in tensors:
            continue
        used |= {key for key in keys.values() if key in tensors}
        a, b = (np.asarray(tensors.read(keys[part]), np.float32) for part in ("lora_A.weight", "lora_B.weight"))
        b = b * (_scale(content, name, a.shape[0]) / adapter.scale)
        a, b = (_filled(array, axis, adapter.rank, directory) for array, axis in ((a, 0), (b, 1)))
        magnitude = tensors.read(keys["lora_magnitude_vector"]) if keys["lora_magnitude_vector"] in tensors else None
        for i, place in enumerate(holder.places):
            found.setdefault(place.path, {})[place.at] = _cut(holder, i, a, b, magnitude)
    unused = [name for name in tensors if name not in used]
    if unused:
        raise UserError(f"{directory} has {some(unused)}, which belong to no hidden matrix of this {config.family}")
    return _stacked(config, found)


def _modules(config: ModelConfig, own: Params) -> Iterator[Module]:
    arrays = {path: np.asarray(array) for path, array in flat(own).items()}
    whole = [path for path in arrays if path.rpartition("/")[2] not in LEAVES]
    if whole:
        raise UserError(
            f"the run trained {some(whole)} in full beside its adapter, for which PEFT's form has no place here; write "
            "the merged model with --to hf"
        )
    for holder in make_plan(config).holders.values():
        parts = tuple(_arrays_at(arrays, place.path, place.at) for place in holder.places)
        if not any(parts):
            continue
        if holder.stored.lead or len(holder.places[0].at) > 1:
            raise UserError("PEFT's form has no adapters of experts here; write the merged model with --to hf")
        yield Module(holder.name.removesuffix(".weight"), holder, parts)


def _arrays_at(arrays: Mapping[str, np.ndarray], path: str, at: tuple[int, ...]) -> Arrays | None:
    return {leaf: arrays[f"{path}/{leaf}"][at] for leaf in LEAVES if f"{path}/{leaf}" in arrays} or None


def _outputs(holder: Holder, which: int) -> tuple[int, ...]:
    """The output axes of a parameter in a tensor."""
    return holder.places[which].shape[holder.stored.split or 0 :]


def _config(config: ModelConfig, adapter: Lora, modules: list[Module], base: str) -> dict[str, Any]:
    grown = [module for module in modules if module.rank != adapter.rank]
    return {
        "peft_type": "LORA",
        "task_type": TASKS.get(config.task),
        "base_model_name_or_path": base,
        "r": adapter.rank,
        "lora_alpha": adapter.alpha,
        "lora_dropout": adapter.dropout,
        "target_modules": [module.name for module in modules],
        "rank_pattern": {module.name: module.rank for module in grown},
        "alpha_pattern": {module.name: adapter.scale * module.rank for module in grown},
        "use_dora": isinstance(adapter, Dora),
        "fan_in_fan_out": not modules[0].holder.stored.transposed,
        "bias": "none",
        "inference_mode": True,
    }


def _open(directory: Path) -> tuple[dict[str, Any], InFiles]:
    if not (directory / CONFIG).is_file() or not (directory / WEIGHTS).is_file():
        raise UserError(f"{directory} is not an adapter in PEFT's form: it lacks {CONFIG} or {WEIGHTS}")
    content: dict[str, Any] = read_json(directory / CONFIG)
    if content.get("peft_type") != "LORA" or content.get("bias", "none") != "none":
        raise UserError(
            f"{directory} is an adapter of the type {content.get('peft_type')!r} with bias {content.get('bias')!r}; "
            "LORA without biases is read"
        )
    strange = [key for key in OTHERS if content.get(key)]
    if strange:
        raise UserError(f"{directory / CONFIG} sets {strange[0]}, which is not read; LoRA and DoRA without it are")
    return content, InFiles(read_header(directory / WEIGHTS))


def _scale(content: Mapping[str, Any], module: str, rank: int) -> float:
    """What a module's product is multiplied by."""
    alpha = (content.get("alpha_pattern") or {}).get(module, content["lora_alpha"])
    return float(alpha / (math.sqrt(rank) if content.get("use_rslora") else rank))


def _updates(directory: Path) -> Iterator[tuple[str, np.ndarray]]:
    """What an adapter adds to each module's weight [outputs, inputs]."""
    content, tensors = _open(directory)
    for name in tensors:
        if name.endswith(".lora_A.weight"):
            a, b = tensors.read(name), tensors.read(name.replace("lora_A", "lora_B"))
            module = name.removeprefix(PREFIX).removesuffix(".lora_A.weight")
            yield module, _scale(content, module, a.shape[0]) * _product(b, a)


def _product(b: np.ndarray, a: np.ndarray) -> np.ndarray:
    return b.astype(np.float32) @ a.astype(np.float32)


def _filled(array: np.ndarray, axis: int, rank: int, directory: Path) -> np.ndarray:
    missing = rank - array.shape[axis]
    if missing < 0:
        raise UserError(f"the adapter {directory} has the rank {array.shape[axis]}; set adapter.rank to it, not {rank}")
    widths = [(0, missing if i == axis else 0) for i in range(2)]
    return np.pad(array, widths)


def _cut(holder: Holder, which: int, a: np.ndarray, b: np.ndarray, magnitude: np.ndarray | None) -> Arrays:
    """One parameter's adapter out of a module's."""
    stored, rank, shape = holder.stored, a.shape[0], holder.places[which].shape
    split = stored.split or 0
    outputs = [(rank, *_outputs(holder, i)) for i in range(len(holder.places))]
    found = {
        "a": a.T.reshape(*shape[:split], rank),
        "b": replace(stored, split=1).cut(b if stored.transposed else b.T, outputs, which),
    }
    if magnitude is not None:
        flat_ = np.asarray(magnitude, np.float32).reshape(-1)
        found["magnitude"] = replace(stored, split=None, transposed=False).cut(flat_, [o[1:] for o in outputs], which)
    return found


def _stacked(config: ModelConfig, found: Mapping[str, Mapping[tuple[int, ...], Arrays]]) -> Params:
    """By parameter and layer -> stacked arrays, as a tree."""
    shapes, out = flat(make_plan(config).shapes), {}
    for path, layers in found.items():
        if len(layers) != shapes[path].shape[0]:
            raise UserError(f"the adapter covers {len(layers)} of the {shapes[path].shape[0]} layers of {path}")
        for leaf in next(iter(layers.values())):
            out[(*path.split("/"), leaf)] = np.stack([layers[at][leaf] for at in sorted(layers)])
    return unflatten_dict(out)
