"""Configuration: frozen dataclasses that go to a file and back exactly, and can be compared.

Nothing here knows of models or training. A configuration is a tree of frozen dataclasses whose leaves are
``bool``, ``int``, ``float``, ``str`` or ``None``; tuples may hold any of these. Where a field is annotated with a
base class, any of its subclasses may stand there: the file names the class, and reading looks it up among the
subclasses that are imported. A number that not every value makes sense for says so in its annotation, as in
``share: Annotated[float, Within(0, 1)]``.
"""

import dataclasses
import difflib
import json
import math
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from lmx.errors import UserError
from lmx.files import write_durably

T = TypeVar("T")
TYPE_KEY = "type"


@dataclass(frozen=True)
class Within:
    """The values that make sense for a number: from ``low`` to ``high``, without that end where ``above`` or ``below``
    says so."""

    low: float
    high: float = math.inf
    above: bool = False
    below: bool = False

    def __contains__(self, value: float) -> bool:
        over = value > self.low if self.above else value >= self.low
        return over and (value < self.high if self.below else value <= self.high)

    def __str__(self) -> str:
        least = f"above {self.low}" if self.above else f"at least {self.low}"
        most = f"below {self.high}" if self.below else f"at most {self.high}"
        return least if self.high == math.inf else f"{least} and {most}"


NOT_NEGATIVE, POSITIVE, COUNT = Within(0), Within(0, above=True), Within(1)
SHARE, BELOW_ONE, BETWEEN = Within(0, 1), Within(0, 1, below=True), Within(0, 1, above=True, below=True)


@dataclass(frozen=True)
class Change:
    """One leaf in which two configurations differ: its dotted path and its two values."""

    path: str
    before: Any
    after: Any

    def __str__(self) -> str:
        return f"{self.path}: {self.before!r} -> {self.after!r}"


def nearest(name: str, known: typing.Iterable[str]) -> str:
    """The known names, the ones most like ``name`` first, for an error message."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    return ", ".join(close + [n for n in names if n not in close])


def to_data(value: Any) -> Any:
    """A configuration as JSON-ready data; every dataclass carries its class name under ``"type"``."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: to_data(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {TYPE_KEY: type(value).__name__, **fields}
    if isinstance(value, tuple | list):
        return [to_data(v) for v in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"a configuration cannot hold {value!r} of type {type(value).__name__}")


def from_data(annotation: Any, data: Any, path: str = "") -> Any:
    """The value of type ``annotation`` that :func:`to_data` turned into ``data``.

    Raises:
      UserError: an unknown or missing key, an unknown class, or a value of another type, named by its path.
    """
    return _read(annotation, data, path, _from_fields)


def typed(config: T) -> T:
    """A configuration that people wrote, as :func:`load` gives it back: with tuples for lists, and floats for the whole
    numbers of float fields.

    Raises:
      UserError: a value of another type than its field's, named by its path.
    """
    return typing.cast(T, _read(type(config), config, "", _from_instance))


Parts = typing.Callable[[type, Any, str], Any]
"""Reads a dataclass: its annotation, what stands for it, and the path."""


def _read(annotation: Any, data: Any, path: str, parts: Parts) -> Any:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        return _from_union(arguments, data, path, parts)
    if origin is typing.Annotated:
        return _read(arguments[0], data, path, parts)
    if origin is typing.Literal:
        return _check(data in arguments, data, annotation, path)
    if origin is tuple:
        return _from_tuple(arguments, data, path, parts)
    if dataclasses.is_dataclass(annotation):
        return parts(typing.cast(type, annotation), data, path)
    if annotation is Any:
        return tuple(data) if isinstance(data, list) else data
    if annotation is float:
        return float(_check(isinstance(data, int | float) and not isinstance(data, bool), data, float, path))
    if annotation is type(None):
        return _check(data is None, data, "null", path)
    return _check(type(data) is annotation, data, annotation, path)


def _check(ok: bool, data: Any, expected: Any, path: str) -> Any:
    if not ok:
        name = getattr(expected, "__name__", str(expected))
        raise UserError(f"{path or 'the configuration'} is {data!r}, expected {name}")
    return data


def _from_union(options: tuple[Any, ...], data: Any, path: str, parts: Parts) -> Any:
    errors = []
    for option in options:
        try:
            return _read(option, data, path, parts)
        except UserError as error:
            errors.append(str(error))
    raise UserError("; ".join(errors))


def _from_tuple(arguments: tuple[Any, ...], data: Any, path: str, parts: Parts) -> tuple[Any, ...]:
    _check(isinstance(data, list | tuple), data, "a list", path)
    if len(arguments) == 2 and arguments[1] is Ellipsis:
        return tuple(_read(arguments[0], v, f"{path}.{i}", parts) for i, v in enumerate(data))
    _check(len(data) == len(arguments), data, f"a list of {len(arguments)}", path)
    return tuple(_read(a, v, f"{path}.{i}", parts) for i, (a, v) in enumerate(zip(arguments, data, strict=True)))


def _subclasses(cls: type) -> Iterator[type]:
    yield cls
    subclass: type
    for subclass in cls.__subclasses__():
        yield from _subclasses(subclass)


def _from_fields(base: type, data: Any, path: str) -> Any:
    _check(isinstance(data, dict), data, f"an object of type {base.__name__}", path)
    classes = {c.__name__: c for c in _subclasses(base) if dataclasses.is_dataclass(c)}
    name = data.get(TYPE_KEY, base.__name__)
    if name not in classes:
        raise UserError(f"{path or 'the configuration'} has type {name!r}, expected one of {nearest(name, classes)}")
    cls = classes[name]
    hints = typing.get_type_hints(cls, include_extras=True)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    unknown = sorted(set(data) - set(fields) - {TYPE_KEY})
    if unknown:
        raise UserError(
            f"{path or 'the configuration'} has the unknown key {unknown[0]!r}; {name} has "
            f"{nearest(unknown[0], fields)}"
        )
    missing = sorted(set(fields) - set(data))
    if missing:
        raise UserError(f"{path or 'the configuration'} lacks the key {missing[0]!r} of {name}")
    return cls(**{k: from_data(hints[k], data[k], f"{path}.{k}" if path else k) for k in fields})


def _from_instance(base: type, value: Any, path: str) -> Any:
    _check(isinstance(value, base), value, base, path)
    hints = typing.get_type_hints(type(value), include_extras=True)
    names = [field.name for field in dataclasses.fields(value)]
    where = {name: f"{path}.{name}" if path else name for name in names}
    return dataclasses.replace(
        value, **{name: _read(hints[name], getattr(value, name), where[name], _from_instance) for name in names}
    )


def check_numbers(config: Any, path: str = "") -> None:
    """Raises UserError for the first number in a configuration that is not :class:`Within` what its field says."""
    hints = typing.get_type_hints(type(config), include_extras=True)
    for field in dataclasses.fields(config):
        value, where = getattr(config, field.name), f"{path}.{field.name}" if path else field.name
        for expected in getattr(hints[field.name], "__metadata__", ()):
            if isinstance(expected, Within) and value not in expected:
                raise UserError(f"{where} is {value}, expected {expected}")
        for i, part in enumerate(value if isinstance(value, tuple) else (value,)):
            if dataclasses.is_dataclass(part):
                check_numbers(part, f"{where}.{i}" if isinstance(value, tuple) else where)


def save(config: Any, file: Path | str) -> None:
    """Writes a configuration as JSON, durably."""
    write_durably(file, json.dumps(to_data(config), indent=2) + "\n")


def load(cls: type[T], file: Path | str) -> T:
    """Reads back what :func:`save` wrote.

    Raises:
      UserError: the file is missing, is not JSON, or does not describe a ``cls``.
    """
    try:
        data = json.loads(Path(file).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"there is no configuration file {file}") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{file} is not a JSON configuration: {error}") from error
    try:
        return typing.cast(T, from_data(cls, data))
    except UserError as error:
        raise UserError(f"{file}: {error}") from error


def flatten(config: Any, path: str = "") -> dict[str, Any]:
    """The leaves of a configuration by dotted path, class names included."""
    data = to_data(config) if dataclasses.is_dataclass(config) else config
    if isinstance(data, dict):
        items: Any = data.items()
    elif isinstance(data, list) and data:
        items = enumerate(data)
    else:
        return {path: data}
    leaves: dict[str, Any] = {}
    for key, value in items:
        leaves |= flatten(value, f"{path}.{key}" if path else str(key))
    return leaves


def diff(before: Any, after: Any) -> tuple[Change, ...]:
    """The leaves in which two configurations differ, in the order of the first; absent leaves are ``None``."""
    old, new = flatten(before), flatten(after)
    return tuple(Change(k, old.get(k), new.get(k)) for k in {**old, **new} if old.get(k) != new.get(k))
