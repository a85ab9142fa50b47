"""Live progress: a bar on a terminal, plain lines elsewhere."""

import sys
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from lmx.train.metrics import Values


class Display:
    """Shows step, loss, tokens/s, model FLOPs utilization and time left on standard error; ``quiet``, nothing.

    ``utilization`` is that of one token a second.
    """

    def __init__(self, steps: int, done: int, utilization: float, *, quiet: bool = False):
        self._utilization = utilization
        self.console = Console(stderr=True, soft_wrap=not sys.stderr.isatty(), quiet=quiet)
        self._bar = Progress(
            TextColumn("[bold]step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[line]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(elapsed_when_finished=False),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self._task = self._bar.add_task("train", total=steps, completed=done, line="compiling")
        self._steps = steps

    def __enter__(self) -> "Display":
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def step(self, step: int, values: Values, *, logged: bool, remark: str = "") -> None:
        """After each step: moves the bar; without a terminal, a line for each logged step, with the remark."""
        speed = values["tokens_per_second"]
        line = f"loss {values['loss']:.4f}  {speed:,.0f} tokens/s  MFU {speed * self._utilization:.1%}"
        self._bar.update(self._task, completed=step, line=line)
        if logged and not self.console.is_terminal:
            left = (self._steps - step) * values["step_seconds"]
            self.console.print(
                f"step {step}/{self._steps}  {line}  left {left:,.0f} s{remark and f'  {remark}'}", highlight=False
            )
        elif remark:
            self.console.print(f"step {step}: {remark}", highlight=False)

    def say(self, text: str) -> None:
        """A line above the bar."""
        self.console.print(text, markup=False, highlight=False)
