"""What ``lmx eval`` scores: held-out rows, tasks, tasks of lm-eval, a sliding context."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from lmx.cli.output import print_result

NONE: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True, kw_only=True)
class TaskOptions:
    """Options of ``lmx eval`` that are about tasks, or about overlapping windows."""

    tasks: tuple[str, ...] = ()
    """Task files, as configs/tasks/boolq.py or my_task.py:variant, in place of the loss; --files are then theirs."""
    harness: tuple[str, ...] = ()
    """Tasks of EleutherAI's lm-eval package, in place of the loss: their names, or YAML files that define them."""
    shots: int | None = None
    """Of tasks: how many examples with their answers stand before each prompt; None is as the task says."""
    limit: int | None = None
    """Only the first examples of each task, or with --stride the first documents; None is as the task says, or all."""
    seed: int | None = None
    """Of tasks: which examples are shown; None is as the task says."""
    stride: int = 0
    """Score documents one by one in windows of --length tokens that advance by so many; 0 scores packed rows."""
    data: str = ""
    """A recipe whose held-out documents are scored instead: any source that a recipe can name. A model of no run is
    scored on what the recipe's objective predicts, as masked tokens of an encoder or corrupted spans of T5."""


OF_TASKS = ("shots", "limit", "seed")
OF_TEXT = ("text_column", "length", "rows", "stride", "data", "written")


def check_options(options: Any) -> None:
    """Refuses options that would be without effect.

    Raises:
      UserError: options of tasks without tasks, those of texts with tasks, or both kinds of tasks.
    """
    from lmx.errors import UserError

    given = [name for name in (*OF_TASKS, *OF_TEXT) if getattr(options, name) != getattr(type(options), name)]
    asked = bool(options.tasks or options.harness)
    idle = [n for n in given if n in (OF_TEXT if asked else OF_TASKS) and not (n == "limit" and options.stride)]
    if idle:
        raise UserError(
            f"--{idle[0].replace('_', '-')} has no effect {'on' if asked else 'without'} tasks; leave it out"
        )
    if options.tasks and options.harness:
        raise UserError("--tasks and --harness were both given; run them one after the other")
    if options.harness and options.files:
        raise UserError("--files has no effect on tasks of lm-eval, whose own files name their data; leave it out")
    if options.data and options.files:
        raise UserError("--data and --files were both given; give the one that is to be scored")
    if options.written and (unused := [n for n in ("files", "length", "rows", "stride") if getattr(options, n)]):
        raise UserError(f"--{unused[0]} has no effect with --written, which takes held-out pairs; leave it out")
    if options.rows and options.stride:
        raise UserError("--rows counts packed rows, which --stride does not make; use --limit")


def evaluate_tasks(options: Any, model: Any, argv: Sequence[str]) -> None:
    """Runs the tasks that the options name, and prints their results."""
    from lmx.eval.run import run_tasks

    if options.harness:
        from lmx.eval.harness import run_harness

        results = run_harness(
            model, options.harness, batch=options.batch, shots=options.shots, limit=options.limit, seed=options.seed
        )
    else:
        results = run_tasks(model, load_tasks(options), batch=options.batch)
    tell(options, model, results, argv)


def load_tasks(options: Any) -> dict[str, Any]:
    """The tasks that the options name, by name, changed as they say."""
    from lmx.cli.recipes import call_file, recipe_name
    from lmx.eval.run import Changes
    from lmx.eval.tasks import Task

    changes = Changes(options.files, options.limit, options.shots, options.seed)
    names = [recipe_name(text) for text in options.tasks]
    twice = {name for name in names if names.count(name) > 1}
    tasks = {}
    for text, name in zip(options.tasks, names, strict=True):
        task: Task = call_file(text, Task, "task")  # type: ignore[type-abstract]
        tasks[text if name in twice else name] = changes.applied(task)
    return tasks


def evaluate_windows(options: Any, model: Any, data: Any, argv: Sequence[str]) -> None:
    """Scores documents in overlapping windows, and prints the result."""
    from lmx.eval.sliding import sliding
    from lmx.eval.tasks.task import Examinee

    examinee = Examinee(model, options.batch)
    found = sliding(examinee, data, length=options.length, stride=options.stride, documents=options.limit or 0)
    tell(options, model, {"text": found}, argv)


def evaluate_rows(options: Any, model: Any, data: Any, recipe: Any, argv: Sequence[str]) -> None:
    """Scores packed rows, and prints the result; its JSON has the plain scores by name too."""
    from dataclasses import fields

    from lmx.eval.metrics.measure import HELD_OUT
    from lmx.eval.perplexity import evaluate
    from lmx.eval.score import Score, in_words

    found = evaluate(model, data, length=options.length, batch=options.batch, rows=options.rows, recipe=recipe)
    scores = {f.name: getattr(found, f.name) for f in fields(Score)}
    tell(options, model, {HELD_OUT: found.result}, argv, words=f"{in_words(scores)}\n\n", scores=scores)


def tell(
    options: Any, model: Any, results: Any, argv: Sequence[str], *, words: str = "", scores: Mapping[str, Any] = NONE
) -> None:
    """Prints results as a table, after ``words``, and as JSON, beside ``scores``, where that was asked for."""
    from dataclasses import asdict

    from lmx.eval.run import as_data, finite, table

    settings = {key: list(v) if isinstance(v, tuple) else v for key, v in asdict(options).items() if key != "json"}
    mesh = {} if model.sharding is None else model.sharding.mesh.shape
    settings["mesh"] = {axis: size for axis, size in mesh.items() if size > 1}
    command = ["lmx", "eval", *argv]
    data = as_data(str(options.model), model.step, results, command, settings)
    data |= {name: finite(value) for name, value in scores.items()}
    people = f"{options.model} after step {model.step}: {shlex.join(command)}\n\n{words}{table(results)}"
    print_result(data, people, options.json)
