"""``lmx generate``: continue prompts."""

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from lmx.cli.output import OutputFile, print_result
from lmx.sharding.launchers import Cluster

if TYPE_CHECKING:
    from lmx.cli.recipes import Placement


@dataclass(frozen=True, kw_only=True)
class Generate(Cluster):
    """Continues prompts with a trained model, or answers a message; texts are shown as they come, one after the other.

    On one device, unless --layout or --mesh says otherwise; on several, also of several processes, each holds its part.

    Example: lmx generate runs/quickstart --prompt "def " --max-new-tokens 64 --temperature 0.8 --seed 1
    """

    model: str
    """A run directory, a Hugging Face directory, or one that lmx convert made."""
    prompt: tuple[str, ...] = ()
    """One or more prompts."""
    chat: str = ""
    """A user's message, in place of prompts: it goes through the model's chat template."""
    system: str = ""
    """With --chat: a system message before it."""
    max_new_tokens: int = 64
    """Tokens to write at most."""
    temperature: float | None = None
    """Divides the logits; 0 takes the likeliest token. This and the next four: None is the model's own setting."""
    top_k: int | None = None
    """Keep the k likeliest tokens; 0 keeps all."""
    top_p: float | None = None
    """Keep the fewest tokens whose probabilities reach p; 1 keeps all."""
    min_p: float | None = None
    """Keep tokens at least min_p times as likely as the likeliest; 0 keeps all."""
    repetition_penalty: float | None = None
    """Makes tokens already seen less likely, above 1."""
    stop: tuple[str, ...] = ()
    """Strings that end the text, and are not part of it."""
    seed: tuple[int, ...] = (0,)
    """One for each prompt, or a single one: prompt i then draws with seed + i, whatever else is in the batch."""
    step: int | None = None
    """Of a run: the checkpoint's step; None is the newest good one."""
    prefill_layout: str = ""
    """On a mesh: the layout whose activations prompts are read with; by default as tokens are written."""
    json: OutputFile = ""
    """Write text, tokens, log-probabilities, finish reasons and the sampling as JSON to this file; "-" is standard
    output."""


def main(argv: Sequence[str]) -> None:
    """Runs ``lmx generate`` with these arguments."""
    from lmx.cli.recipes import parse_placed
    from lmx.cli.runtime import start_jax

    options, place = parse_placed("generate", Generate, argv)
    from lmx.errors import UserError

    if bool(options.prompt) == bool(options.chat):
        what = "both --prompt and --chat were given" if options.chat else "there is no prompt"
        raise UserError(f'{what}; give one or more prompts, as in: lmx generate runs/quickstart --prompt "def "')
    start_jax(options)
    from lmx.sharding.processes import together

    with together():
        print_result(*_generated(options, place), options.json)


def _generated(options: Generate, place: "Placement") -> tuple[dict[str, Any], str]:
    """The result, and what of it is still to be shown to people: the texts are, as they come."""
    from lmx.cli.runtime import load_placed
    from lmx.decode.defaults import SAMPLED
    from lmx.decode.generate import Row, completed
    from lmx.decode.pace import LIVE, STEADY
    from lmx.sharding.processes import is_first

    model = load_placed(options.model, place, step=options.step, reading=options.prefill_layout)
    sampling = model.defaults.with_options(**{name: getattr(options, name) for name in SAMPLED})
    drawn = asdict(sampling)
    if model.experiment is None and is_first():
        print(f"sampling: {_listed(drawn)} (given, else {model.defaults.source})", file=sys.stderr)
    prompts = options.prompt or (model.chat_text(_messages(options)),)
    screen = Screen(options.prompt or ("",))
    shows = options.json != "-"
    rows: list[Row] = []
    for rows, news in model.chunks(
        prompts,
        is_chat=bool(options.chat),
        seed=options.seed[0] if len(options.seed) == 1 else options.seed,
        max_new_tokens=options.max_new_tokens,
        sampling=sampling,
        stop=options.stop,
        pace=LIVE if shows else STEADY,
    ):
        if shows and is_first():
            screen.show(news, [row.finish_reason is not None for row in rows])
    pairs = list(zip(prompts, completed(rows), strict=True))
    return {"completions": [{"prompt": p, **asdict(c)} for p, c in pairs], "sampling": drawn}, ""


class Screen:
    """Shows texts one after the other: each as it comes, once those before it have ended. A prompt is shown with the
    first of its text, when it has proved to be one."""

    def __init__(self, prompts: Sequence[str]) -> None:
        self._held, self._at = list(prompts), 0

    def show(self, news: Sequence[str], ended: Sequence[bool]) -> None:
        """Takes what each text has gained, and whether it has ended."""
        self._held = [held + piece for held, piece in zip(self._held, news, strict=True)]
        while self._at < len(ended):
            print(self._held[self._at], end="", flush=True)
            self._held[self._at] = ""
            if not ended[self._at]:
                return
            self._at += 1
            print("\n---\n" if self._at < len(ended) else "", end="", flush=True)


def _messages(options: Generate) -> list[dict[str, str]]:
    system = [{"role": "system", "content": options.system}] if options.system else []
    return [*system, {"role": "user", "content": options.chat}]


def _listed(sampling: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:g}" for name, value in sampling.items())
