"""Tasks of EleutherAI's lm-eval package on a model of lmx (Gao et al., "A framework for few-shot language model
evaluation")."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lmx.config import nearest
from lmx.decode.loaded import Model
from lmx.errors import UserError
from lmx.eval.asking import reads_texts
from lmx.eval.metrics.measure import Measure
from lmx.eval.run import Result
from lmx.eval.sliding import windows
from lmx.eval.tasks.generation import written
from lmx.eval.tasks.task import Examinee

NEW_TOKENS = 256
"""The longest answer of a task that does not say."""
SAMPLED = ("temperature", "top_p", "top_k", "min_p")
SEED = 1234
"""What lm-eval draws examples with, unless told otherwise."""
METHOD = "lm-eval's own"


class Adapter:
    """What lm-eval asks of a model. Each request has its texts in ``args``."""

    def __init__(self, model: Model, batch: int = 8) -> None:
        super().__init__()
        self.examinee = Examinee(model, batch)

    def loglikelihood(self, requests: Sequence[Any], **_: Any) -> list[tuple[float, bool]]:
        """For (context, continuation): the continuation's log-probability, and whether it is what greedy decoding
        gives."""
        pairs = [self.examinee.asking.pair(*request.args) for request in requests]
        return [(found.logprob, found.greedy) for found in self.examinee.likelihoods(pairs)]

    def loglikelihood_rolling(self, requests: Sequence[Any], **_: Any) -> list[float]:
        """For (text,): the log-probability of all of it, in windows as long as the model's context.

        Raises:
          UserError: the model does not predict whole texts token by token.
        """
        way = reads_texts(self.examinee.asking, self.examinee.model.config.family)
        texts = [(way.opening, *way.plain(request.args[0])) for request in requests]
        reads = [windows(tokens, way.room, way.room) for tokens in texts]
        scores = iter(self.examinee.scorer.read([read for own in reads for read in own]))
        return [sum(float(next(scores).logprobs.sum(dtype="float64")) for _ in own) for own in reads]

    def generate_until(self, requests: Sequence[Any], **_: Any) -> list[str]:
        """For (context, options): the text up to one of the strings ``until``.

        Raises:
          UserError: options that lmx does not know.
        """
        groups: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(index)
        texts = [""] * len(requests)
        for options, group in groups.items():
            contexts = [requests[i].args[0] for i in group]
            for i, text in zip(group, self._written(contexts, json.loads(options)), strict=True):
                texts[i] = text
        return texts

    def _written(self, contexts: Sequence[str], options: dict[str, Any]) -> list[str]:
        until, most = options.pop("until", []), int(options.pop("max_gen_toks", NEW_TOKENS))
        sampled = options.pop("do_sample", bool(options.get("temperature")))
        sampling = {name: options.pop(name) for name in SAMPLED if name in options}
        if options:
            raise UserError(f"lm-eval asks for {', '.join(options)}, which lmx does not do when it generates")
        stop = [until] if isinstance(until, str) else list(until)
        sampling = sampling if sampled else {"temperature": 0}
        texts, _ = written(self.examinee, contexts, new_tokens=most, stop=stop, **sampling)
        return [str(text) for text in texts]

    @property
    def tokenizer_name(self) -> str:
        """Names the tokenizer, for caches."""
        return self.examinee.tokenizer.fingerprint

    def apply_chat_template(self, chat_history: list[dict[str, str]], **options: Any) -> str:
        """The text of a conversation, by the model's own template."""
        return self.examinee.model.chat_text(chat_history, **options)


def harness_model(model: Model, batch: int = 8) -> Any:
    """The model as an ``lm_eval.api.model.LM``, to be given to ``lm_eval.simple_evaluate``.

    Raises:
      UserError: lm-eval is not installed.
    """
    _package()
    from lm_eval.api.model import LM

    return type("LmxModel", (Adapter, LM), {})(model, batch)


def run_harness(
    model: Model,
    tasks: Sequence[str],
    *,
    batch: int = 8,
    shots: int | None = None,
    limit: int | None = None,
    seed: int | None = None,
) -> dict[str, Result]:
    """The results of tasks of lm-eval: by their names, or YAML files that define them.

    Raises:
      UserError: lm-eval is not installed, or there is no such task.
    """
    lm_eval = _package()
    from lm_eval.tasks import TaskManager

    files = [Path(task) for task in tasks if Path(task).suffix in (".yaml", ".yml")]
    manager = TaskManager(
        include_path=[str(file.parent.resolve()) for file in files] or None, include_defaults=len(files) < len(tasks)
    )
    names = [_named(Path(task)) if Path(task) in files else task for task in tasks]
    unknown = [name for name in names if name not in manager.all_tasks]
    if unknown:
        near = ", ".join(nearest(unknown[0], manager.all_tasks).split(", ")[:5])
        raise UserError(f"lm-eval has no task {unknown[0]!r}; nearest are {near or 'none'}; or give its YAML file")
    found = lm_eval.simple_evaluate(
        model=harness_model(model, batch),
        tasks=names,
        num_fewshot=shots,
        limit=limit,
        task_manager=manager,
        log_samples=False,
        fewshot_random_seed=SEED if seed is None else seed,
    )
    return {name: _result(found, name) for name in found["results"]}


def _package() -> Any:
    try:
        import lm_eval
    except ModuleNotFoundError as error:
        raise UserError(
            "tasks of lm-eval need the package lm-eval, which is not installed; run: pip install 'lmx[harness]'"
        ) from error
    return lm_eval


def _named(file: Path) -> str:
    """The name of the task that a YAML file defines."""
    text = file.read_text(encoding="utf-8") if file.is_file() else ""
    name = re.search(r"^task:\s*['\"]?([^\s'\"#]+)", text, re.MULTILINE)
    if name is None:
        raise UserError(f"{file} defines no task of lm-eval: it is not there, or has no line 'task: NAME'")
    return name[1]


def _result(found: Mapping[str, Any], name: str) -> Result:
    numbers, n = found["results"][name], found.get("n-samples", {}).get(name, {}).get("effective", 0)
    better = found.get("higher_is_better", {}).get(name, {})
    measures = {}
    for key, value in numbers.items():
        metric, _, chosen = key.partition(",")
        if not isinstance(value, int | float) or metric.endswith("_stderr") or not chosen:
            continue
        error = numbers.get(f"{metric}_stderr,{chosen}")
        error = float(error) if isinstance(error, int | float) else None
        label = metric if chosen == "none" else f"{metric} ({chosen})"
        measures[label] = Measure(float(value), error, METHOD, int(n), better.get(metric))
    configuration = json.loads(json.dumps(found.get("configs", {}).get(name, {}), default=str))
    return Result(int(n), measures, configuration)
