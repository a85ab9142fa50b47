"""What the work of reading a source is cut into."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Span:
    """Bytes ``start`` to ``end`` of a file, such row groups of a Parquet file, or a ``split`` of a TFDS directory;
    ``size`` is in bytes. ``held_out`` says that its examples are."""

    path: str
    size: int
    start: int = 0
    end: int = 0
    split: str = ""
    held_out: bool = False
