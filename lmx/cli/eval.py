"""``lmx eval``: score a model on held-out text."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class Eval:
    """Loss, perplexity and bits per byte of a trained model, on its run's held-out documents or on other text.

    Example: lmx eval runs/quickstart --files "texts/*.txt" --json score.json
    """

    model: str
    """A run directory, a Hugging Face directory, or one that lmx convert made."""
    files: tuple[str, ...] = ()
    """Paths or globs of text to score instead (.txt, .jsonl, .parquet), all of it."""
    text_column: str = "text"
    """The column of .jsonl and .parquet files that holds the text."""
    length: int = 0
    """Tokens in a row, which is the longest context; 0 is the run's training length, else 1024 or the context."""
    batch: int = 8
    """Rows at once."""
    rows: int = 0
    """Rows to score; 0 for all."""
    step: int | None = None
    """Of a run: the checkpoint's step; None is the newest good one."""
    json: str = ""
    """Also write the scores as JSON to this file; "-" is standard output."""


def main(argv: Sequence[str]) -> None:
    """Runs ``lmx eval`` with these arguments."""
    import tyro

    configured = tyro.conf.configure(tyro.conf.PositionalRequiredArgs)(Eval)
    options = tyro.cli(configured, prog="lmx eval", args=list(argv))
    from lmx.cli.recipes import print_result
    from lmx.cli.runtime import start_jax

    start_jax()
    from lmx.data.config import DataConfig, LocalFiles, TokenizerFile
    from lmx.data.tokenizer import tokenizer_file
    from lmx.decode.loaded import load
    from lmx.errors import UserError
    from lmx.eval.perplexity import evaluate
    from lmx.experiment import RunDir

    model = load(options.model, step=options.step)
    run = model.experiment
    if run is None and not options.files:
        raise UserError(f'{options.model} is not a run, so it has no held-out text of its own; give --files "*.txt"')
    data = run.corpus if run else DataConfig()
    directory = RunDir(Path(options.model)).tokenizer if run else Path(options.model)
    if options.files:
        data = DataConfig(
            sources=(LocalFiles(files=options.files, text_column=options.text_column),),
            tokenizer=TokenizerFile(path=str(tokenizer_file(directory) or directory)),
            held_out=1.0,
            cache_dir=data.cache_dir,
        )
    result = evaluate(model, data, length=options.length, batch=options.batch, rows=options.rows)
    people = (
        f"{options.model} after step {model.step}, {result.targets:,} tokens, {result.bytes:,} bytes of text:\n"
        f"loss {result.loss:.4f} nats a token, perplexity {result.perplexity:.2f}, "
        f"{result.bits_per_byte:.4f} bits per byte, {result.accuracy:.1%} of tokens predicted"
    )
    print_result({"model": options.model, "step": model.step, **asdict(result)}, people, options.json)
