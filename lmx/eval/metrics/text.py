"""Measures of text: exact match and F1 as SQuAD has them, BLEU and chrF (sacrebleu), ROUGE (rouge-score)."""

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import zip_longest
from typing import Any

from lmx.eval.metrics.measure import Measure, bootstrapped, check_some, mean, needs

References = Sequence[Sequence[str]]
"""For each text, those that it may be."""
Measured = tuple[dict[str, Measure], dict[str, str]]
"""Measures by name, and what is to be told of how they were made."""
ROUGES = ("rouge1", "rouge2", "rougeL", "rougeLsum")


def normalised(text: str) -> str:
    """An answer as SQuAD compares it: lower case, without punctuation, articles and surplus blanks (Rajpurkar et al.
    2016, 6.1)."""
    kept = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", kept).split())


def exact_match(answer: str, references: Sequence[str]) -> float:
    """1 if the normalised answer is one of the normalised references, else 0; no reference stands for no answer."""
    return float(any(normalised(answer) == normalised(r) for r in references or [""]))


def token_f1(answer: str, references: Sequence[str]) -> float:
    """The harmonic mean of precision and recall of normalised words, with the reference that fits best."""
    return max(_f1(normalised(answer).split(), normalised(r).split()) for r in references or [""])


def _f1(answer: list[str], reference: list[str]) -> float:
    if not answer or not reference:
        return float(answer == reference)
    common = sum((Counter(answer) & Counter(reference)).values())
    return 2 * common / (len(answer) + len(reference))


def answers(texts: Sequence[str], references: References) -> Measured:
    """``exact_match`` and ``f1`` over questions."""
    pairs = list(zip(texts, references, strict=True))
    found = {"exact_match": exact_match, "f1": token_f1}
    return {name: mean([of(t, r) for t, r in pairs], name) for name, of in found.items()}, {}


def exact(texts: Sequence[str], references: References) -> Measured:
    """``exact_match``: the text, without blanks around, is one of the references; nothing else is normalised."""
    pairs = zip(texts, references, strict=True)
    values = [float(t.strip() in [r.strip() for r in own]) for t, own in pairs]
    return {"exact_match": mean(values, "exact_match")}, {}


def bleu(texts: Sequence[str], references: References) -> Measured:
    """Corpus BLEU, 0 to 100 (Papineni et al. 2002; Post 2018), with sacrebleu's defaults and its signature."""
    return _sacrebleu("bleu", "BLEU", texts, references)


def chrf(texts: Sequence[str], references: References) -> Measured:
    """Corpus chrF2, 0 to 100 (Popović 2015), with sacrebleu's defaults and its signature."""
    return _sacrebleu("chrf", "CHRF", texts, references)


def _sacrebleu(name: str, kind: str, texts: Sequence[str], references: References) -> Measured:
    check_some(len(texts), name)
    try:
        import sacrebleu.metrics
    except ModuleNotFoundError as error:
        raise needs("sacrebleu", name) from error
    metric: Any = getattr(sacrebleu.metrics, kind)()
    streams = [list(stream) for stream in zip_longest(*references)]
    # Counts of each text, from which sacrebleu makes the score of any of them together.
    counts = metric._extract_corpus_statistics(list(texts), streams)
    score = lambda index: float(metric._aggregate_and_compute([counts[i] for i in index]).score)  # noqa: E731
    found = {name: bootstrapped(score, len(texts), name)}
    return found, {f"{name} signature": str(metric.get_signature())}


def rouge(texts: Sequence[str], references: References) -> Measured:
    """``rouge1``, ``rouge2``, ``rougeL`` and ``rougeLsum``: mean F-measures, 0 to 1 (Lin 2004), of rouge-score with its
    stemmer, each with the reference that fits best."""
    check_some(len(texts), "rouge")
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ModuleNotFoundError as error:
        raise needs("rouge-score", "rouge") from error
    scorer: Any = RougeScorer(ROUGES, use_stemmer=True)
    scores = [scorer.score_multi(list(own), text) for text, own in zip(texts, references, strict=True)]
    note = {"rouge": "rouge-score, F-measure, use_stemmer=True"}
    return {name: mean([s[name].fmeasure for s in scores], name) for name in ROUGES}, note


TEXT_METRICS: dict[str, Callable[[Sequence[str], References], Measured]] = {
    "bleu": bleu,
    "chrf": chrf,
    "rouge": rouge,
    "exact_match": exact,
    "squad": answers,
}
"""What generated text may be measured by, by name."""
