"""A command's own options, read without its recipe. Imports no JAX: a parent that only watches needs none."""

from collections.abc import Sequence
from typing import Any, TypeVar

import tyro

Options = TypeVar("Options")
CONFIG = (tyro.conf.FlagConversionOff,)
"""How every command line is read."""


def read_options(command: str, options: type[Options], argv: Sequence[str]) -> Options:
    """The options of ``command`` itself. Those of the recipe, mistakes in them and a call for help are left to
    :func:`lmx.cli.recipes.parse`.

    Raises:
      SystemExit: (code 2) an ill-typed option of the command; tyro has named it.
    """
    own = [arg for arg in argv if arg not in ("-h", "--help")]
    read: Any = tyro.cli(options, prog=f"lmx {command} RECIPE", args=own, config=CONFIG, return_unknown_args=True)
    return read[0]
