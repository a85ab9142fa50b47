"""What a command writes: the files that its options name, and its result."""

import os
from collections.abc import Callable
from typing import Annotated, Any

from tyro.constructors import PrimitiveConstructorSpec

from lmx.errors import UserError
from lmx.files import check_reachable, json_text, write_file
from lmx.sharding.processes import is_first


def _file(path: str) -> str:
    """The path of a file to write, looked at before any work is done; empty for none, "-" for standard output."""
    if path not in ("", "-"):
        if os.path.isdir(path):
            raise UserError(f"{path} is a directory, expected the file to write")
        check_reachable(path)
    return path


def _page(path: str) -> str:
    if path == "-":
        raise UserError("a page does not go to standard output; name the file to write")
    return _file(path)


def _read_by(read: Callable[[str], str]) -> PrimitiveConstructorSpec[str]:
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="FILE",
        instance_from_str=lambda words: read(words[0]),
        is_instance=lambda value: isinstance(value, str),
        str_from_instance=lambda path: [path],
    )


OutputFile = Annotated[str, _read_by(_file)]
"""The type of an option that names a file to write, "-" being standard output. One that cannot be written is a
UserError when the command line is read; directories that it lacks are made."""
PageFile = Annotated[str, _read_by(_page)]
"""The same for a page, which needs a file."""


def print_result(result: dict[str, Any], people: str, file: str) -> None:
    """Prints what is for people, and the same as JSON to ``file``; "-" is standard output and then prints only that.

    Of several processes the first does so.
    """
    if not is_first():
        return
    if file == "-":
        print(json_text(result, indent=2))
        return
    print(people)
    if file:
        write_file(file, json_text(result, indent=2) + "\n")
