"""Saves tiny states for ever: test_kill.py runs this and kills it."""

import sys

import jax.numpy as jnp

from lmx.checkpoint.checkpointer import Checkpointer
from lmx.checkpoint.config import CheckpointConfig


def main(directory: str) -> None:
    with Checkpointer(directory, CheckpointConfig(keep=2)) as checkpointer:
        step = max(checkpointer.steps(), default=0)
        while True:
            step += 1
            checkpointer.save(step, {"w": jnp.full((64, 64), step, jnp.float32)}, {"step": step})
            print(step, flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
