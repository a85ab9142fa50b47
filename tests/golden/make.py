"""Makes the reference outputs of tiny random models, with transformers or, where that has none, with slow NumPy.

    pip install "lmx[parity]"
    python tests/golden/make.py                                            # every file of this folder again
    python tests/golden/make.py llama gemma2 --seed 7 --vary --out /tmp/parity    # other models of two families

A file NAME.npz holds ``config`` (the content of config.json), ``tensor:NAME`` for every tensor of the checkpoint,
``tokens`` [batch, length], ``segments`` (1 real, 0 padding), ``positions``, and what the model makes of them:
``logits`` (zero at padding), the mean ``loss`` over real tokens, for some tensors ``gradient:NAME``, and more by kind
(``outputs.py``). Names and layouts are those on disk. This script needs no lmx, and the tests need neither PyTorch
nor transformers.
"""

import argparse
import json
import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import decoders
import encoder_decoders
import encoders
import numpy as np
import outputs
import references
import torch
import transformers
from safetensors.numpy import load_file
from sizes import Sizes, sizes_for

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Reference:
    """How to make one file: the configuration and class, the batch, and the outputs."""

    made: Callable[[Sizes], decoders.Made]
    batch: Callable[..., outputs.Tensors]
    outputs: Callable[..., outputs.Tensors]


def plain(made: Callable[..., decoders.Made]) -> Reference:
    """A decoder without padding, larger, of a vocabulary above 128."""
    return Reference(
        lambda s: made(replace(s, vocab=s.vocab + 136, hidden=s.hidden + 16)),
        lambda *args: outputs.decoder_batch(*args, spans=outputs.whole),
        outputs.decoder,
    )


REFERENCES = {
    **{n: Reference(m, outputs.decoder_batch, outputs.decoder) for n, m in decoders.MODELS.items()},
    "gpt2": plain(decoders.gpt2),
    "llama": plain(decoders.llama),
    **{n: Reference(m, outputs.encoder_batch, outputs.encoder) for n, m in encoders.MODELS.items()},
    **{
        n: Reference(m, outputs.encoder_decoder_batch, outputs.encoder_decoder)
        for n, m in encoder_decoders.MODELS.items()
    },
    **{n: Reference(m, outputs.task_batch, outputs.task) for n, m in (encoders.TASKS | encoder_decoders.TASKS).items()},
}


def randomise(model: torch.nn.Module, generator: torch.Generator) -> None:
    """Fills every parameter and saved buffer, biases and scales too, so that each of them shows in the outputs.

    The values are multiples of 1/16, for smaller files.
    """
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for name, values in (trained | saved_buffers(model)).items():
        is_scale = values.ndim == 1 and name.endswith("weight")
        spread = 0.05 if name.endswith(".q.weight") else 0.2  # T5 does not scale its scores, its queries start small
        drawn = float(is_scale) + spread * torch.randn(values.shape, generator=generator)
        with torch.no_grad():
            values.copy_((16 * drawn).round() / 16)


def saved_buffers(model: torch.nn.Module) -> outputs.Tensors:
    """What a checkpoint holds although it is not trained by gradient."""
    saved = model.state_dict()
    return {name: b for name, b in model.named_buffers() if name in saved and b.is_floating_point()}


def untie(model: torch.nn.Module) -> None:
    """Gives a T5 1.1 the output table of its own that transformers takes from checkpoints only."""
    if getattr(model.config, "scale_decoder_outputs", True) is False:
        model.lm_head.weight = torch.nn.Parameter(torch.zeros_like(model.lm_head.weight))


def save(model: torch.nn.Module, folder: Path) -> None:
    """A checkpoint; a T5 1.1 says in its configuration what those on the Hub say."""
    model.save_pretrained(folder)
    if getattr(model.config, "scale_decoder_outputs", True) is False:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"tie_word_embeddings": False}, indent=2) + "\n")


def golden(reference: Reference, sizes: Sizes, folder: Path) -> Arrays:
    """The content of one file, computed by the model as loaded from the checkpoint that is left in the folder."""
    generator = torch.Generator().manual_seed(sizes.seed)
    config, kind = reference.made(sizes)
    made = kind(config)
    untie(made)
    randomise(made, generator)
    save(made, folder)
    model = kind.from_pretrained(folder, attn_implementation="eager", experts_implementation="eager").eval()
    same = all(torch.equal(a, model.state_dict()[name]) for name, a in made.state_dict().items())
    assert same, "the checkpoint holds another model"
    batch = reference.batch(model, sizes, generator)
    found = reference.outputs(model, batch)
    return {
        "config": np.array((folder / "config.json").read_text()),
        **{name: a.to(torch.int32).numpy() for name, a in batch.items()},
        **{name: a.detach().float().numpy() for name, a in found.items()},
        **{f"tensor:{name}": a for name, a in load_file(folder / "model.safetensors").items()},
        **(gradients(model, found["loss"]) if "loss" in found else {}),
    }


def gradients(model: torch.nn.Module, loss: torch.Tensor, most: int = 2200) -> Arrays:
    """The loss's gradients of a vector of each kind and of three matrices, named and laid out as on disk."""
    loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.full_like(parameter, np.nan) if parameter.grad is None else parameter.grad)
        for name in saved_buffers(model):
            model.get_buffer(name).fill_(np.nan)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        found = load_file(Path(folder) / "model.safetensors")
    reached = {name: a for name, a in found.items() if not np.isnan(a).any()}
    kinds = {re.sub(r"\d+", "", name): name for name, a in reached.items() if a.ndim == 1}
    matrices = sorted(name for name, a in reached.items() if a.ndim > 1 and a.size <= most)
    some = [*matrices[:1], *matrices[len(matrices) // 2 :][:1], *matrices[-1:], *kinds.values()]
    return {f"gradient:{name}": reached[name] for name in sorted(set(some))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", help="files to make; all unless given")
    parser.add_argument("--seed", type=int, default=0, help="of parameters, tokens and varied sizes")
    parser.add_argument("--vary", action="store_true", help="draw the sizes from the seed")
    parser.add_argument("--scale", type=int, default=1, help="widths and vocabulary times this")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder of the files")
    parser.add_argument("--checkpoints", action="store_true", help="keep each checkpoint in the folder NAME too")
    options = parser.parse_args()
    transformers.logging.disable_progress_bar()
    known = REFERENCES | references.MODELS
    unknown = set(options.names) - set(known)
    if unknown:
        parser.error(f"unknown {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    options.out.mkdir(parents=True, exist_ok=True)
    sizes = sizes_for(options.seed, options.vary, options.scale)
    for name in options.names or known:
        path = options.out / f"{name}.npz"
        np.savez_compressed(path, **make(known[name], sizes, options.out / name if options.checkpoints else None))
        print(f"{path}: {path.stat().st_size / 1000:.0f} kB", flush=True)


def make(reference: Any, sizes: Sizes, kept: Path | None) -> Arrays:
    if not isinstance(reference, Reference):
        return reference(sizes)
    with tempfile.TemporaryDirectory() as scratch:
        return golden(reference, sizes, kept or Path(scratch))


if __name__ == "__main__":
    main()
