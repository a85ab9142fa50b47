"""The model's functions as one program each; called by themselves, each of their operations is compiled alone."""

import jax

from lmx.models import model
from lmx.nn import kernel

init_params = model.init_params  # not as one: models have shapes in common, of which each is compiled once
unstack_layers = jax.jit(model.unstack_layers, static_argnames="spec")
encode = jax.jit(model.encode, static_argnames=("spec", "remat"))
apply = jax.jit(model.apply, static_argnames=("spec", "remat"))
logits = jax.jit(model.logits, static_argnames="spec")
plain = jax.jit(kernel.plain)
task = jax.jit(model.task, static_argnames=("spec", "name"))
