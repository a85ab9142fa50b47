"""BLEU of what a model writes for held-out pairs, in training and from its run."""

import json
import random
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import sacrebleu

import lmx
from lmx.cli.main import main
from lmx.data.config import AlignedFiles, DataConfig, TrainedBpe
from lmx.data.prepare import prepare
from lmx.errors import UserError
from lmx.eval.written import HeldOutPairs, written
from lmx.experiment import EvalConfig, Experiment, TrainConfig
from lmx.models.families.llama import Llama
from lmx.models.families.transformer import Transformer
from lmx.objectives.seq_to_seq import SeqToSeq
from lmx.optim.schedule import Schedule
from lmx.train.run import train

WORDS = ["one", "two", "three", "four", "five", "six", "seven"]


@pytest.fixture(scope="module")
def experiment(tmp_path_factory: pytest.TempPathFactory) -> Experiment:
    """Five words, and the same in capitals."""
    directory, rng = tmp_path_factory.mktemp("pairs"), random.Random(0)
    lines = [" ".join(rng.choices(WORDS, k=5)) + f" {i}" for i in range(80)]
    (directory / "a.txt").write_text("\n".join(lines))
    (directory / "b.txt").write_text("\n".join(line.upper() for line in lines))
    source = AlignedFiles(files=(str(directory / "a.txt"),), target_files=(str(directory / "b.txt"),))
    return Experiment(
        model=Transformer(vocab=320, context=64, layers=1, width=32, heads=2, head_dim=16, hidden=64),
        data=DataConfig(sources=(source,), tokenizer=TrainedBpe(vocab_size=320), held_out=0.3),
        objective=SeqToSeq(target_length=32),
        schedule=Schedule(peak=1e-2, warmup=2),
        train=TrainConfig(steps=4, batch=8, length=64, remat="none"),
        eval=EvalConfig(written=10),
    )


@pytest.fixture(scope="module")
def run(experiment: Experiment, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("run")
    train(experiment, path)
    return path


def test_the_bleu_of_training_is_that_of_the_loaded_run(run: Path, experiment: Experiment) -> None:
    logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()][-1]
    pairs = HeldOutPairs.of(prepare(experiment.corpus, progress=False), experiment, 10)
    assert len(pairs.sources) == len(pairs.targets) == 10
    assert all(target == source.upper() for source, target in zip(pairs.sources, pairs.targets, strict=True))
    model = lmx.load(run)
    texts = [done.text.strip() for done in model.generate(pairs.sources, max_new_tokens=32, temperature=0)]
    references = [list(pairs.targets)]
    assert logged["eval_bleu"] == pytest.approx(sacrebleu.corpus_bleu(texts, references).score, abs=1e-9)
    assert logged["eval_chrf"] == pytest.approx(sacrebleu.corpus_chrf(texts, references).score, abs=1e-9)
    copied = sacrebleu.corpus_bleu(list(pairs.sources), references).score
    assert logged["eval_copy_bleu"] == pytest.approx(copied, abs=1e-9)


def test_lmx_eval_tells_the_same_with_its_error_and_signature(run: Path, tmp_path: Path) -> None:
    logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()][-1]
    main(["eval", str(run), "--written", "10", "--json", str(tmp_path / "found.json")])
    found = json.loads((tmp_path / "found.json").read_text())["tasks"]["held-out pairs"]
    assert found["measures"]["chrf"]["value"] == pytest.approx(logged["eval_chrf"], abs=1e-9)
    assert found["measures"]["chrf"]["stderr"] > 0
    assert {"rouge1", "rouge2", "rougeL", "rougeLsum", "exact_match", "copy_bleu"} < set(found["measures"])
    assert "version" in found["notes"]["bleu signature"]
    with pytest.raises(UserError, match="--stride has no effect with --written"):
        _options(["eval", str(run), "--written", "10", "--stride", "8"])


def test_what_is_copied_matches_exactly_and_rouge_may_be_missing(
    run: Path, experiment: Experiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(HeldOutPairs, "texts", lambda self, write: [*self.targets[:5], *self.sources[5:]])
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    found = written(lmx.load(run), experiment.corpus, 10)
    assert found.measures["exact_match"].value == 0.5
    assert "rouge1" not in found.measures
    assert "rouge needs rouge-score, which is not installed" in found.notes["left out"]


def _options(argv: list[str]) -> None:
    from lmx.cli.eval import Eval
    from lmx.cli.eval_tasks import check_options
    from lmx.cli.recipes import parse_placed

    check_options(parse_placed("eval", Eval, argv[1:])[0])


def test_what_does_not_write_is_refused_before_training(experiment: Experiment) -> None:
    prepared = prepare(experiment.corpus, progress=False)
    with pytest.raises(UserError, match="no held-out pair with at most 63 tokens of source and 2 of target"):
        HeldOutPairs.of(prepared, replace(experiment, objective=SeqToSeq(target_length=2)), 5)
    decoder = replace(
        experiment, model=Llama(vocab=320, context=64, layers=1, width=32, heads=2, kv_heads=2, hidden=64)
    )
    with pytest.raises(UserError, match=r"of a decoder a target_length below train\.length"):
        HeldOutPairs.of(prepared, replace(decoder, objective=SeqToSeq()), 5)
