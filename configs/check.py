"""One tiny recipe of each kind of model, whose sizes every mesh of 8 devices divides.

cd configs; lmx check mesh check.py:decoder check.py:encoder check.py:encoder_decoder check.py:mixture --devices 8
cd configs; lmx check mesh check.py:dropless --devices 8

Rows are packed, with uneven numbers of targets. The optimizer's eps is well above the rounding of
a gradient, which Adam would blow up to a whole step. Expect the same numbers on all 56 meshes (of the mixture
on 50: a capacity does not go with stages where the sequence is split, which dropless does).
"""

from typing import Any

from lmx.experiment import Experiment, TrainConfig
from lmx.models.families.bert import Bert
from lmx.models.families.llama import Llama
from lmx.models.families.mixtral import Mixtral
from lmx.models.families.t5 import T5
from lmx.nn.dispatch import Capacity, Dispatch, Dropless
from lmx.objectives.denoising import SpanCorruption
from lmx.objectives.masked_lm import MaskedLm
from lmx.optim.optimizer import AdamW
from lmx.optim.schedule import Schedule

SIZES: dict[str, Any] = {"vocab": 250, "context": 32, "width": 16, "heads": 8, "hidden": 16}


def _tiny(model: Any, accumulate: int = 1, **changes: Any) -> Experiment:
    return Experiment(
        model=model,
        optimizer=AdamW(eps=1e-5),
        schedule=Schedule(peak=1e-3, warmup=1),
        train=TrainConfig(batch=8 * accumulate, length=32, accumulate=accumulate, remat="none"),
        **changes,
    )


def decoder() -> Experiment:
    """Llama, predicting the next token; steps accumulate."""
    return _tiny(Llama(**SIZES, layers=8, kv_heads=8, head_dim=4), accumulate=2)


def encoder() -> Experiment:
    """BERT, predicting masked tokens."""
    return _tiny(Bert(**SIZES, layers=8, task="token_prediction"), objective=MaskedLm())


def encoder_decoder() -> Experiment:
    """T5, saying the spans that are missing."""
    return _tiny(T5(**SIZES, encoder_layers=8, decoder_layers=8, head_dim=4), objective=SpanCorruption(sentinels=16))


def mixture() -> Experiment:
    """Mixtral with a capacity, so that choices are dropped, and both of the routers' losses; steps accumulate."""
    return _mixture(Capacity(1.25))


def dropless() -> Experiment:
    """The same without a capacity: every token reaches its experts, on meshes with stages and a split sequence too."""
    return _mixture(Dropless())


def _mixture(dispatch: Dispatch) -> Experiment:
    model = Mixtral(**SIZES, layers=8, kv_heads=8, head_dim=4, dispatch=dispatch, balance_loss=0.02, z_loss=1e-3)
    return _tiny(model, accumulate=2)
