"""Adapters in the form of Hugging Face's PEFT: ``adapter_config.json`` and ``adapter_model.safetensors``."""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import unflatten_dict

from lmx.adapters.adapter import LEAVES, Dora, Lora
from lmx.adapters.peft_modules import (
    LENGTHS,
    LINEAR,
    PREFIX,
    TABLE,
    Arrays,
    Module,
    Table,
    arrays_at,
    found_pair,
    is_table,
    linear_arrays,
    module_of,
    table_arrays,
)
from lmx.checkpoint.huggingface.export import write_json
from lmx.checkpoint.huggingface.files import read_header, write_file
from lmx.checkpoint.huggingface.plan import flat, make_plan
from lmx.checkpoint.huggingface.tensors import InFiles, read_json, some
from lmx.errors import LmxError, UserError
from lmx.models.config import ModelConfig
from lmx.nn.module import Params

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
TIED = "embed_tokens"
"""The one name by which PEFT knows an embedding whose adapter a tied head shares."""
OTHERS = (
    *("layer_replication", "trainable_token_indices", "use_qalora", "lora_bias", "target_parameters", "kasa_config"),
    *("modules_to_save", "use_bdlora", "arrow_config", "alora_invocation_tokens", "velora_config", "monteclora_config"),
)
"""Entries of PEFT's configuration that change what is computed, and that are not read here."""
TASKS = {"token_prediction": "CAUSAL_LM", "sequence_classification": "SEQ_CLS", "token_classification": "TOKEN_CLS"}


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
      UserError: adapters of experts, some of tables, or parameters trained in full, which have no such form here.
      LmxError: what was read back is not what was written.
    """
    modules = list(_modules(config, own))
    _check_tables(config, adapter, modules)
    tensors = {name: array for module in modules for name, array in module.tensors().items()}
    infos = {name: jax.ShapeDtypeStruct(array.shape, array.dtype) for name, array in tensors.items()}
    write_file(directory / WEIGHTS, infos, lambda name: tensors[name])
    write_json(directory / CONFIG, _config(config, adapter, modules, base))
    again = dict(_updates(directory))
    worst = 0.0
    for module in modules:
        a, b = list(module.arrays().values())[:2]
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
        pair = found_pair(tensors, name)
        if pair is None:
            continue
        used |= {f"{PREFIX}{name}.{key}" for key in (*LINEAR, *TABLE, LENGTHS)}
        a, b = pair[0], pair[1] * (_scale(content, name, len(pair[0])) / adapter.scale)
        a, b = _filled((a, b), adapter, "table_rank" if is_table(holder) else "rank", directory)
        lengths = f"{PREFIX}{name}.{LENGTHS}"
        magnitude = tensors.read(lengths) if lengths in tensors else None
        for i, place in enumerate(holder.places):
            own = table_arrays(holder, a, b) if is_table(holder) else linear_arrays(holder, i, a, b, magnitude)
            found.setdefault(place.path, {})[place.at] = own
    unused = [name for name in tensors if name not in used]
    if unused:
        raise UserError(f"{directory} has {some(unused)}, which belong to no hidden matrix of this {config.family}")
    return _stacked(config, found)


def _check_tables(config: ModelConfig, adapter: Lora, modules: list[Module]) -> None:
    tables = [module.name for module in modules if isinstance(module, Table)]
    if tables and isinstance(adapter, Dora):
        raise UserError(
            "PEFT's DoRA has lengths of tables too, which are not trained here; write the merged model with --to hf"
        )
    if tables and _is_tied(config) and tables[0].rpartition(".")[2] != TIED:
        raise UserError(
            f"PEFT ties the adapters of an embedding and a head only where the embedding is called {TIED}, and that of "
            f"a {config.family} is {tables[0]}; write the merged model with --to hf"
        )


def _is_tied(config: ModelConfig) -> bool:
    head = config.spec().head
    return head is not None and head.tied


def _modules(config: ModelConfig, own: Params) -> Iterator[Module]:
    arrays = {path: np.asarray(array) for path, array in flat(own).items()}
    whole = [path for path in arrays if path.rpartition("/")[2] not in LEAVES]
    if whole:
        raise UserError(
            f"the run trained {some(whole)} in full beside its adapter, for which PEFT's form has no place here; write "
            "the merged model with --to hf"
        )
    for holder in make_plan(config).holders.values():
        parts = tuple(arrays_at(arrays, place.path, place.at) for place in holder.places)
        if not any(parts):
            continue
        if holder.stored.lead or len(holder.places[0].at) > 1:
            raise UserError("PEFT's form has no adapters of experts here; write the merged model with --to hf")
        yield module_of(holder, parts)


def _config(config: ModelConfig, adapter: Lora, modules: list[Module], base: str) -> dict[str, Any]:
    grown = [module for module in modules if module.rank != adapter.rank]
    tables = [module for module in modules if isinstance(module, Table)]
    kernels = [module for module in modules if module not in tables]
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
        "fan_in_fan_out": bool(kernels) and not kernels[0].holder.stored.transposed,
        "ensure_weight_tying": bool(tables) and _is_tied(config),
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
    firsts = (f".{LINEAR[0]}", f".{TABLE[0]}")
    modules = (name.removeprefix(PREFIX).removesuffix(end) for name in tensors for end in firsts if name.endswith(end))
    for module in modules:
        pair = found_pair(tensors, module)
        assert pair is not None
        a, b = pair
        yield module, _scale(content, module, len(a)) * _product(b, a)


def _product(b: np.ndarray, a: np.ndarray) -> np.ndarray:
    return b.astype(np.float32) @ a.astype(np.float32)


def _filled(pair: tuple[np.ndarray, np.ndarray], adapter: Lora, field: str, directory: Path) -> list[np.ndarray]:
    """A and B with zeros up to the rank that a field of the adapter says."""
    rank: int = getattr(adapter, field)
    missing = rank - len(pair[0])
    if missing < 0:
        raise UserError(f"the adapter {directory} has the rank {len(pair[0])}; set adapter.{field} to it, not {rank}")
    return [np.pad(array, [(0, missing if i == axis else 0) for i in range(2)]) for axis, array in enumerate(pair)]


def _stacked(config: ModelConfig, found: Mapping[str, Mapping[tuple[int, ...], Arrays]]) -> Params:
    """By parameter and layer -> arrays of the stacked, padded parameters, as a tree."""
    shapes: dict[str, Any] = flat(make_plan(config).shapes)
    out: dict[tuple[str, ...], np.ndarray] = {}
    for path, layers in found.items():
        rows = shapes[path].shape[0]
        for leaf in next(iter(layers.values())):
            if () in layers:  # a table, which is of no layer
                array = layers[()][leaf]
                whole = np.pad(array, ((0, rows - len(array)), (0, 0))) if leaf == "a" else array
            elif len(layers) == rows:
                whole = np.stack([layers[at][leaf] for at in sorted(layers)])
            else:
                raise UserError(f"the adapter covers {len(layers)} of the {rows} layers of {path}")
            out[(*path.split("/"), leaf)] = whole
    return unflatten_dict(out)
