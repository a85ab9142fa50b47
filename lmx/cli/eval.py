"""``lmx eval``: score a model on held-out text."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from lmx.cli.eval_tasks import TaskOptions
from lmx.cli.output import OutputFile
from lmx.sharding.launchers import Cluster

if TYPE_CHECKING:
    from lmx.cli.recipes import Placement
    from lmx.data.config import DataConfig
    from lmx.decode.loaded import Model
    from lmx.experiment import Experiment


@dataclass(frozen=True, kw_only=True)
class Eval(TaskOptions, Cluster):
    """Loss, perplexity and bits per byte of a trained model, on its run's held-out documents or on other text; or what
    it reaches in tasks. Of a run's own labelled data also F1, Matthews' correlation and the calibration error, or the
    mean absolute error and correlations. Each number has its standard error; lmx report compares the JSON files.

    On one device, unless --layout or --mesh says otherwise; on several, also of several processes, each holds its part.

    Example: lmx eval runs/quickstart --files "texts/*.txt" --json score.json
    Example: lmx eval runs/transformer --written 500
    Example: lmx eval path/to/a/masked/model --data configs/bert.py:whole_words
    Example: lmx eval runs/quickstart --tasks configs/tasks/boolq.py --files BoolQ/dev.jsonl --shots 2
    """

    model: str
    """A run directory, a Hugging Face directory, or one that lmx convert made."""
    files: tuple[str, ...] = ()
    """Paths or globs of text to score instead (.txt, .jsonl, .parquet), all of it."""
    text_column: str = "text"
    """The column of .jsonl and .parquet files that holds the text."""
    length: int = 0
    """Tokens in a row, which is the longest context; 0 is the training length of the run, else of the recipe in --data,
    else 1024, and at most the context."""
    batch: int = 8
    """Rows at once."""
    rows: int = 0
    """Rows to score; 0 for all."""
    written: int = 0
    """Of a run on pairs: score instead what the model writes for so many held-out sources, with BLEU, chrF, ROUGE (if
    rouge-score is installed) and exact match."""
    step: int | None = None
    """Of a run: the checkpoint's step; None is the newest good one."""
    json: OutputFile = ""
    """Also write the scores as JSON to this file; "-" is standard output."""


def main(argv: Sequence[str]) -> None:
    """Runs ``lmx eval`` with these arguments."""
    from lmx.cli.eval_tasks import check_options
    from lmx.cli.recipes import parse_placed
    from lmx.cli.runtime import start_jax

    options, place = parse_placed("eval", Eval, argv)
    check_options(options)
    start_jax(options)
    from lmx.sharding.processes import together

    with together():
        _evaluate(options, place, argv)


def _evaluate(options: Eval, place: "Placement", argv: Sequence[str]) -> None:
    from lmx.cli.eval_tasks import evaluate_rows, evaluate_tasks, evaluate_windows, tell
    from lmx.cli.recipes import load_recipe
    from lmx.cli.runtime import load_placed
    from lmx.eval.written import written

    model = load_placed(options.model, place, step=options.step)
    if options.tasks or options.harness:
        evaluate_tasks(options, model, argv)
        return
    recipe = load_recipe(options.data) if options.data else None
    data = _data(options, model, recipe)
    if options.stride:
        evaluate_windows(options, model, data, argv)
    elif options.written:
        tell(options, model, {"held-out pairs": written(model, data, options.written)}, argv)
    else:
        evaluate_rows(options, model, data, recipe, argv)


def _data(options: Eval, model: "Model", recipe: "Experiment | None") -> "DataConfig":
    """What is scored, with the model's own tokenizer: the files or the recipe's documents, else the run's own."""
    from lmx.data.config import DataConfig, LocalFiles, TokenizerFile
    from lmx.data.tokenizer import tokenizer_file
    from lmx.errors import UserError
    from lmx.experiment import RunDir

    run = model.experiment
    directory = RunDir(Path(options.model)).tokenizer if run else Path(options.model)
    tokenizer = TokenizerFile(path=str(tokenizer_file(directory) or directory))
    if recipe is not None:
        return replace(recipe.corpus, tokenizer=tokenizer)
    if options.files:
        return DataConfig(
            sources=(LocalFiles(files=options.files, text_column=options.text_column),),
            tokenizer=tokenizer,
            held_out=1.0,
            cache_dir=(run.corpus if run else DataConfig()).cache_dir,
        )
    if run is None:
        raise UserError(
            f'{options.model} is not a run, so it has no held-out text of its own; give --files "*.txt", or --data and '
            "a recipe"
        )
    return run.corpus
