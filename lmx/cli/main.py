"""The command ``lmx``: finds the command's module, and turns errors into one sentence and an exit code."""

import atexit
import errno
import gc
import importlib
import os
import sys
import warnings
from collections.abc import Sequence

from lmx.errors import EXIT_DONE, EXIT_FAILURE, EXIT_INTERRUPTED, EXIT_USER_ERROR, LmxError

COMMANDS = {
    "train": "Train a recipe, or go on with a run.",
    "lr": "Find a learning rate for a recipe.",
    "eval": "Score a model on held-out text.",
    "generate": "Continue prompts.",
    "inspect": "Look inside of a model while it reads a text.",
    "convert": "Write a model as a Hugging Face directory, or as one of lmx.",
    "model": "Show a model's parameters, shardings and costs.",
    "data": "Prepare a recipe's data, or show its statistics.",
    "check": "Check a recipe on meshes, or a run under faults.",
    "plan": "Compile a recipe for a TPU slice without one: memory and communication.",
    "bench": "Measure training or decoding.",
    "report": "Write an HTML page about runs.",
}
RESUMABLE = ("train", "data")
"""The commands that go on with what they did before."""
USAGE = "usage: lmx COMMAND ...\n\ncommands (each has --help with an example):\n" + "".join(
    f"  {name:10}{summary}\n" for name, summary in COMMANDS.items()
)
COLLECT = (500_000, 50, 50)
"""When Python looks for cycles, in place of 700 objects, 10 and 10: imports and traces make millions of objects that
stay, and going through them took a tenth of a start."""
EXAMPLE = "\nexample: lmx train configs/quickstart.py --train.steps 200\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command. Exit codes: 0 done, 75 interrupted and resumable, 2 the user's mistake, 1 a failure."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE + EXAMPLE, end="")
        return EXIT_DONE if arguments else EXIT_USER_ERROR
    name, *rest = arguments
    if name == "--version":
        from importlib.metadata import version

        print(version("lmx"))
        return EXIT_DONE
    if name not in COMMANDS:
        print(f"lmx: there is no command {name!r}; the commands are {', '.join(COMMANDS)}", file=sys.stderr)
        return EXIT_USER_ERROR
    gc.set_threshold(*COLLECT)
    atexit.register(gc.freeze)  # at its end Python would look for cycles among all that was imported: half a second
    return _run(name, rest)


def _run(name: str, arguments: list[str]) -> int:
    try:
        with warnings.catch_warnings():
            # A warning is one sentence for the user, without the place in the code that gave it.
            warnings.showwarning = lambda message, *_: print(f"lmx {name}: warning: {message}", file=sys.stderr)
            importlib.import_module(f"lmx.cli.{name}").main(arguments)
    except LmxError as error:
        print(f"lmx {name}: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        more = "; run the same command again to go on" if name in RESUMABLE else ""
        print(f"lmx {name}: interrupted{more}", file=sys.stderr)
        return EXIT_INTERRUPTED if name in RESUMABLE else EXIT_FAILURE
    except BrokenPipeError:  # the reader of our output left, as in `lmx ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILURE
    except OSError as error:
        if error.errno in (errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP):
            print(f"lmx {name}: {error.filename or 'a path'}: {error.strerror}; give another path", file=sys.stderr)
            return EXIT_USER_ERROR
        if error.errno not in (errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EDQUOT):
            raise
        print(f"lmx {name}: {error.filename or 'a file'} cannot be written: {error.strerror}", file=sys.stderr)
        return EXIT_FAILURE
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
