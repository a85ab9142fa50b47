"""The quickstart's model, distilled into one a quarter of its size.

lmx train configs/quickstart.py
lmx train configs/distil.py --run-dir runs/student
lmx train configs/distil.py:alone --run-dir runs/alone

The second reads the first as its teacher (--objective.teacher DIR for another), and the third trains the same small
model without one, on the same rows. Compare their held-out losses: lmx report runs/student runs/alone. Expect 4.95
nats a token of the student, as the teacher has, and 5.12 without it.
"""

from dataclasses import replace

from quickstart import quickstart

from lmx.experiment import Experiment
from lmx.objectives.distillation import Distillation


def distil() -> Experiment:
    """Learns the next token half from the text and half from the teacher's predictions."""
    return replace(alone(), objective=Distillation(teacher="runs/quickstart"))


def alone() -> Experiment:
    """The small model by itself: 0.8M parameters."""
    base = quickstart()
    model = replace(base.model, width=96, heads=4, kv_heads=2, head_dim=24, hidden=256)
    return replace(base, model=model)
