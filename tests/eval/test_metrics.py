"""Measures against independent plain ones, and the published libraries' own."""

import math

import numpy as np
import pytest
import sacrebleu

from lmx.errors import UserError
from lmx.eval.metrics.classification import calibration_error, classification_measures, f1, matthews
from lmx.eval.metrics.measure import bootstrapped, mean
from lmx.eval.metrics.regression import regression_measures
from lmx.eval.metrics.text import TEXT_METRICS, exact_match, normalised, token_f1

RNG = np.random.default_rng(5)
TEXTS = ["the cat sat on the mat", "a dog", "birds sing in an old garden"]
REFERENCES = [["the cat sat on a mat", "a cat was on the mat"], ["the dog"], ["birds sing in the old garden"]]


def random_answers(n: int, classes: int) -> tuple[np.ndarray, np.ndarray]:
    scores = RNG.normal(size=(n, classes))
    return RNG.integers(classes, size=n), np.exp(scores) / np.exp(scores).sum(1, keepdims=True)


@pytest.mark.parametrize("classes", [2, 4])
def test_classification_is_that_of_scikit_learn(classes: int) -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    expected, probabilities = random_answers(60, classes)
    answers, found = probabilities.argmax(1), classification_measures(expected, probabilities, positive=0)
    accuracy = (expected == answers).mean()
    assert found["accuracy"].value == pytest.approx(accuracy)
    assert found["accuracy"].stderr == pytest.approx(math.sqrt(accuracy * (1 - accuracy) / 59))
    for average in ("macro", "micro"):
        own = metrics.f1_score(expected, answers, average=average, labels=range(classes), zero_division=0)
        assert found[f"f1_{average}"].value == pytest.approx(own)
    assert found["matthews"].value == pytest.approx(metrics.matthews_corrcoef(expected, answers))
    assert ("f1_binary" in found) == (classes == 2)
    if classes == 2:
        assert found["f1_binary"].value == pytest.approx(metrics.f1_score(expected, answers, pos_label=0))
    assert 0 < found["f1_macro"].stderr < 0.2


def test_classes_that_never_come_count_as_zero() -> None:
    one = np.array([[3, 0, 1], [0, 0, 0], [0, 0, 0]])
    assert f1(one).tolist() == [6 / 7, 0, 0]
    assert matthews(one) == 0


def test_calibration_error() -> None:
    right, sure = np.array([1, 0, 1, 1, 0], bool), np.array([0.95, 0.95, 0.55, 0.6, 0.05])
    # Bins of a tenth, upper ends included: |1 - 1.9| + |2 - 1.15| + |0 - 0.05|.
    assert calibration_error(right, sure, bins=10) == pytest.approx((0.9 + 0.85 + 0.05) / 5)


def test_numbers_are_measured_as_scipy_does() -> None:
    stats = pytest.importorskip("scipy.stats")
    expected = RNG.integers(4, size=(50, 2)).astype(float)  # many are equal
    predicted = expected + RNG.normal(size=(50, 2)).round(1)
    found = regression_measures(expected, predicted)
    for name, of in (("pearson", stats.pearsonr), ("spearman", stats.spearmanr)):
        columns = [of(expected[:, i], predicted[:, i]).statistic for i in range(2)]
        assert found[name].value == pytest.approx(np.mean(columns))
        assert 0 < found[name].stderr < 0.2
    errors = np.abs(expected - predicted).mean(1)
    assert found["mean_absolute_error"].value == pytest.approx(errors.mean())
    assert found["mean_absolute_error"].stderr == pytest.approx(errors.std(ddof=1) / math.sqrt(50))
    assert not found["mean_absolute_error"].higher_is_better
    same = regression_measures(expected, np.ones((50, 2)))
    assert (same["pearson"].value, same["spearman"].value) == (0, 0)


def test_answers_are_normalised_as_squad_does() -> None:
    assert normalised("  The Cat's, an old-HAT! ") == "cats oldhat"
    assert exact_match("the CAT.", ["a dog", "cat"]) == 1
    assert exact_match("", []) == 1
    assert exact_match("cat", []) == 0
    assert token_f1("the big red cat", ["red cat", "dog"]) == pytest.approx(2 * (2 / 3) / (5 / 3))
    assert token_f1("cat cat", ["cat"]) == pytest.approx(2 / 3)
    assert token_f1("", [""]) == 1
    assert token_f1("the", ["cat"]) == 0


def test_bleu_and_chrf_are_sacrebleus() -> None:
    streams = [[own[0] for own in REFERENCES], [own[1] if len(own) > 1 else None for own in REFERENCES]]
    for name, metric in (("bleu", sacrebleu.BLEU()), ("chrf", sacrebleu.CHRF())):
        measures, notes = TEXT_METRICS[name](TEXTS, REFERENCES)
        assert measures[name].value == pytest.approx(metric.corpus_score(TEXTS, streams).score)
        assert measures[name].stderr > 0
        assert "version:" in notes[f"{name} signature"]
        zero, _ = TEXT_METRICS[name](["q", "z"], [["hello there"], ["big cat"]])
        assert (zero[name].value, zero[name].stderr) == (0, 0)


def test_rouge_of_plain_overlaps() -> None:
    measures, _ = TEXT_METRICS["rouge"](["the cat sat", "dogs"], [["the cat ran home"], ["birds", "dog"]])
    assert measures["rouge1"].value == pytest.approx((2 * 2 / (3 + 4) + 1) / 2)  # stemmed: dogs are a dog
    assert measures["rouge2"].value == pytest.approx((2 * 1 / (2 + 3)) / 2)
    assert measures["rougeL"].value == pytest.approx((2 * 2 / (3 + 4) + 1) / 2)


def test_exact_match_of_generation_normalises_only_blanks() -> None:
    measures, _ = TEXT_METRICS["exact_match"]([" 42", "The cat"], [["42 "], ["the cat"]])
    assert measures["exact_match"].value == 0.5


@pytest.mark.parametrize("name", TEXT_METRICS)
def test_an_empty_set_is_refused(name: str) -> None:
    with pytest.raises(UserError, match="has nothing to measure"):
        TEXT_METRICS[name]([], [])


def test_an_empty_set_of_classes_is_refused() -> None:
    with pytest.raises(UserError, match="accuracy has nothing to measure"):
        classification_measures(np.zeros(0, int), np.zeros((0, 2)))


def test_the_bootstrap_agrees_with_the_formula_and_one_example_has_no_error() -> None:
    values = RNG.normal(size=200)
    assert bootstrapped(lambda i: values[i].mean(), 200, "m").stderr == pytest.approx(mean(values, "m").stderr, rel=0.1)
    assert mean([1.0], "m").stderr is None
    assert bootstrapped(lambda i: 1.0, 1, "m").stderr is None
