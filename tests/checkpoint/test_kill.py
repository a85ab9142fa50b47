import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp

from lmx.checkpoint.checkpointer import Checkpointer
from lmx.checkpoint.config import CheckpointConfig

ROOT = Path(__file__).parents[2]
VICTIM = Path(__file__).with_name("kill_victim.py")


def save_and_kill(directory, saves, delay):
    """Lets the victim save some steps, kills it ``delay`` seconds later; returns the last step it began."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, VICTIM, directory]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as victim:
        for _ in range(saves):
            last = int(victim.stdout.readline())
        time.sleep(delay)
        victim.send_signal(signal.SIGKILL)
        rest = victim.stdout.read().split()
    return int(rest[-1]) if rest else last


def test_kill_while_saving_leaves_a_good_checkpoint(tmp_path):
    target = {"w": jax.ShapeDtypeStruct((64, 64), jnp.float32)}
    for _ in range(2):
        # A save that has begun tells that the one before is complete; one more may be, untold.
        begun = save_and_kill(tmp_path, saves=3, delay=random.uniform(0, 0.3))
        with Checkpointer(tmp_path, CheckpointConfig(keep=2)) as checkpointer:
            back = checkpointer.restore(target)
        assert begun - 1 <= back.step <= begun + 1
        assert (back.state["w"] == back.step).all()
        assert back.meta == {"step": back.step}
