"""From one kind of model directory to another: written, read back, and compared with what was read."""

import shutil
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from lmx.checkpoint.checkpointer import Checkpointer
from lmx.checkpoint.config import CheckpointConfig
from lmx.checkpoint.huggingface import new_directory, verify_tensors, write_json, write_tensors
from lmx.data.chat import TEMPLATE
from lmx.data.tokenizer import FILES, SETTINGS
from lmx.data.tokenizer_files import SPECIALS_MAP
from lmx.decode.adapters import export_adapter
from lmx.decode.defaults import FILE as GENERATION
from lmx.decode.forward import POOLED, is_encoder
from lmx.decode.loaded import Model
from lmx.decode.sources import CHECKPOINTS, MODEL, PARAMS, Source, describe, open_source
from lmx.errors import LmxError, UserError
from lmx.nn.module import Params

Form = Literal["hf", "lmx", "peft"]
DTYPES = ("float32", "bfloat16", "float16")
TEXT_FILES = (
    *FILES,
    *("target.spm", "merges.txt", "added_tokens.json", SETTINGS, SPECIALS_MAP, TEMPLATE, GENERATION),
)
"""What is copied beside the parameters, where the source has it."""
ROWS, LENGTH, TOLERANCE = 2, 16, 1e-5
Outputs = dict[str, np.ndarray]


@dataclass(frozen=True)
class Converted:
    """What was written.

    Attributes:
      directory: where.
      family: the model's.
      parameters: how many numbers, padding of the vocabulary included.
      dtypes: that they have, with how many each.
      compared: the outputs on random tokens that were the same before and after, with the largest difference.
    """

    directory: str
    family: str
    parameters: int
    dtypes: dict[str, int]
    compared: dict[str, float]


def convert(
    source: Path,
    target: Path,
    to: Form,
    *,
    dtype: str | None = None,
    step: int | None = None,
    told: Callable[[str], None] = lambda stage: None,
) -> Converted:
    """Writes a model as a Hugging Face directory or as one of lmx, or a run's adapter alone for PEFT; it appears whole
    or not at all.

    One copy of the parameters is in memory at a time.

    Args:
      source: a run directory, a Hugging Face directory, or one of lmx.
      target: new or empty.
      to: which kind to write.
      dtype: of the parameters; None keeps the source's.
      step: of a run, the checkpoint's step.
      told: is called with what is being done, for people.

    Raises:
      UserError: a source that cannot be read, a target that is there already or lies in the source, or a model that has
        no such form.
      LmxError: what was read back is not what was written; nothing is left at ``target``.
    """
    if dtype not in (None, *DTYPES):
        raise UserError(f"--dtype is {dtype!r}, expected one of {', '.join(DTYPES)}")
    if target.resolve().is_relative_to(source.resolve()) and target.resolve() != source.resolve():
        raise UserError(f"{target} lies in {source}, which is only read; give a directory outside it")
    opened = open_source(source)
    if to == "peft":
        numbers, compared = export_adapter(opened, target, dtype, step, told)
        return Converted(str(target), opened.config.family, sum(numbers.values()), numbers, compared)
    if to == "hf":
        opened.config.to_huggingface()  # refuses what has no such form before anything large is read
        if opened.config.config_map.own:
            warnings.warn(
                f"transformers has no class for {opened.config.family}: only lmx reads {target}", stacklevel=2
            )
    with new_directory(target) as folder:
        told(f"reading {source}")
        before, numbers = _write(opened, folder, to, dtype, step, told)
        told("reading it back")
        again = open_source(folder)
        compared = _compare(before, outputs(again, again.read(None, None, None)[0]))
    return Converted(str(target), opened.config.family, sum(numbers.values()), numbers, compared)


def outputs(source: Source, params: Params) -> Outputs:
    """What a model computes for some random tokens: its logits, and the scores of its task head."""
    model = Model(source.config, params)
    spec, rng = model.spec, np.random.default_rng(0)
    shape = ROWS, min(LENGTH, spec.context)
    tokens, decoder_tokens = (rng.integers(0, spec.vocab, shape) for _ in range(2))
    decoder = decoder_tokens if spec.encoder else None
    found = {}
    # Compiled as a whole for CPU, a model in bfloat16 has all of its weights in float32 too while it runs.
    with jax.disable_jit(any(leaf.dtype != jnp.float32 for leaf in jax.tree.leaves(params))):
        if spec.head is not None:
            found["logits"] = model.logits(tokens, decoder)
        if any(head.name != POOLED for head in spec.tasks):
            found["scores"] = model.scores(tokens, decoder)
        if not found:
            found["embeddings"] = model.embed(tokens)
    return {name: np.asarray(values) for name, values in found.items()}


def _write(
    source: Source, folder: Path, to: Form, dtype: str | None, step: int | None, told: Callable[[str], None]
) -> tuple[Outputs, dict[str, int]]:
    """Reads the model and writes it; what it computes, and how many numbers of each dtype it has."""
    params, at = source.read(dtype, None, step)
    numbers: dict[str, int] = {}
    for leaf in jax.tree.leaves(params):
        numbers[str(leaf.dtype)] = numbers.get(str(leaf.dtype), 0) + leaf.size
    told(f"writing {sum(leaf.nbytes for leaf in jax.tree.leaves(params)) / 1e9:.2f} GB")
    _write_texts(source, folder)
    if to == "hf":
        _write_huggingface(source, params, folder, max(numbers, key=lambda name: numbers[name]), told)
    else:
        _write_lmx(source, params, folder, at)
    told("computing logits of random tokens")
    return outputs(source, params), numbers


def _write_huggingface(source: Source, params: Params, folder: Path, dtype: str, told: Callable[[str], None]) -> None:
    write_tensors(source.config, params, folder)
    own = source.config.to_huggingface()
    ids = {key: index for key, index in _token_ids(source).items() if key not in own}
    # transformers called it torch_dtype until its version 5.
    kinds = {"dtype": dtype, "torch_dtype": dtype}
    write_json(folder / "config.json", {**own, **ids, **source.entries, **kinds})
    told("comparing every tensor with what was read back")
    verify_tensors(source.config, params, folder)


def _write_lmx(source: Source, params: Params, folder: Path, step: int) -> None:
    write_json(folder / MODEL, describe(source, params))
    with Checkpointer(folder / CHECKPOINTS, CheckpointConfig(asynchronous=False)) as checkpointer:
        checkpointer.save(step, {PARAMS: params}, {})


def _write_texts(source: Source, folder: Path) -> None:
    """The tokenizer, the chat template and how it is meant to be decoded."""
    if source.experiment is None:
        for name in TEXT_FILES:
            if (source.path / name).is_file():
                shutil.copyfile(source.path / name, folder / name)
        return
    if source.tokenizer is not None:
        source.tokenizer.save(folder)
        if source.template is not None:
            (folder / TEMPLATE).write_text(source.template.source, encoding="utf-8")
        if not (folder / FILES[0]).is_file():
            warnings.warn(f"the run's tokenizer is not a {FILES[0]}; lmx reads it, transformers may not", stacklevel=2)
    spec = source.config.spec()
    if spec.head is not None and not is_encoder(spec):
        drawn = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
        ends = {"eos_token_id": list(source.defaults.stops)} if source.defaults.stops else {}
        write_json(folder / GENERATION, {**_token_ids(source), **drawn, **ends})


def _token_ids(source: Source) -> Mapping[str, int]:
    """The ids of the special tokens that a run's tokenizer knows; other sources say them themselves."""
    if source.experiment is None or source.tokenizer is None:
        return {}
    roles = source.tokenizer.special_tokens
    wanted = [role for role in ("bos_token", "eos_token", "pad_token") if role in roles]
    ids = {role: source.tokenizer.token_id(roles[role]) for role in wanted}
    return {f"{role}_id": index for role, index in ids.items() if index is not None}


def _compare(before: Outputs, after: Outputs) -> dict[str, float]:
    """The largest difference of each output.

    Raises:
      LmxError: they differ.
    """
    differences = {}
    for name, wanted in before.items():
        found = after.get(name)
        if found is None or found.shape != wanted.shape:
            raise LmxError(f"the model that was written gives no {name} of the shape {wanted.shape}; nothing is kept")
        if not np.allclose(found, wanted, rtol=TOLERANCE, atol=TOLERANCE, equal_nan=True):
            raise LmxError(
                f"the {name} of the model that was written differ by {np.nanmax(np.abs(found - wanted)):.2g} from the "
                "source's; nothing is kept"
            )
        differences[name] = float(np.nan_to_num(np.abs(found - wanted)).max())
    return differences
