"""``lmx generate``: continue prompts."""

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Generate:
    """Continues prompts with a trained model; one prompt's text is shown as it comes.

    Example: lmx generate runs/quickstart --prompt "def " --max-new-tokens 64 --temperature 0.8 --seed 1
    """

    model: str
    """A run directory."""
    prompt: tuple[str, ...] = ()
    """One or more prompts."""
    max_new_tokens: int = 64
    """Tokens to write at most."""
    temperature: float = 1.0
    """Divides the logits; 0 takes the likeliest token."""
    top_k: int = 0
    """Keep the k likeliest tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the fewest tokens whose probabilities reach p; 1 keeps all."""
    min_p: float = 0.0
    """Keep tokens at least min_p times as likely as the likeliest; 0 keeps all."""
    repetition_penalty: float = 1.0
    """Makes tokens already seen less likely, above 1."""
    stop: tuple[str, ...] = ()
    """Strings that end the text, and are not part of it."""
    seed: int = 0
    """Prompt i draws with seed + i, whatever else is in the batch."""
    step: int | None = None
    """The checkpoint's step; None is the newest good one."""
    json: str = ""
    """Write text, tokens, log-probabilities and finish reasons as JSON to this file; "-" is standard output."""


def main(argv: Sequence[str]) -> None:
    """Runs ``lmx generate`` with these arguments."""
    import tyro

    configured = tyro.conf.configure(tyro.conf.PositionalRequiredArgs)(Generate)
    options = tyro.cli(configured, prog="lmx generate", args=list(argv))
    from lmx.cli.recipes import print_result
    from lmx.cli.runtime import start_jax
    from lmx.decode.generate import Row, completed
    from lmx.decode.loaded import load
    from lmx.decode.sampling import Sampling
    from lmx.errors import UserError

    sampling = Sampling(options.temperature, options.top_k, options.top_p, options.min_p, options.repetition_penalty)
    if not options.prompt:
        raise UserError('there is no prompt; give one or more, as in: lmx generate runs/quickstart --prompt "def "')
    start_jax()
    model = load(options.model, step=options.step)
    shows = len(options.prompt) == 1 and options.json != "-"
    if shows:
        print(options.prompt[0], end="", flush=True)
    rows: list[Row] = []
    for latest, news in model.generator.stream(
        options.prompt,
        max_new_tokens=options.max_new_tokens,
        sampling=sampling,
        seeds=[options.seed + i for i in range(len(options.prompt))],
        stop=options.stop,
    ):
        rows = latest
        if shows:
            print(news[0], end="", flush=True)
    sys.stdout.flush()
    pairs = list(zip(options.prompt, completed(rows), strict=True))
    people = "" if shows else "\n---\n".join(prompt + c.text for prompt, c in pairs)
    print_result({"completions": [{"prompt": p, **asdict(c)} for p, c in pairs]}, people, options.json)
