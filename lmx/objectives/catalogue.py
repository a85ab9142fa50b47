"""Every objective: whoever imports this can read a configuration that names any of them."""

from lmx.objectives.chat import ChatSft
from lmx.objectives.class_distillation import ClassDistillation
from lmx.objectives.classification import Classification, MultiLabel, Regression
from lmx.objectives.denoising import Denoisers, PrefixLm, SpanCorruption
from lmx.objectives.distillation import Distillation
from lmx.objectives.fill_in_the_middle import FillInTheMiddle
from lmx.objectives.masked_lm import MaskedLm, Nsp
from lmx.objectives.next_token import NextToken
from lmx.objectives.objective import Objective
from lmx.objectives.preference import Preference
from lmx.objectives.seq_to_seq import SeqToSeq
from lmx.objectives.span_answers import ExtractiveQa
from lmx.objectives.token_classification import TokenClassification

OBJECTIVES: tuple[type[Objective], ...] = (
    *(NextToken, FillInTheMiddle, MaskedLm, Nsp),
    *(SpanCorruption, Denoisers, PrefixLm, SeqToSeq),
    *(Classification, MultiLabel, Regression, TokenClassification, ExtractiveQa, ChatSft),
    *(Distillation, ClassDistillation, Preference),
)
