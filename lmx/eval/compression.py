"""What a general-purpose compressor needs for the same text: the yardstick beside a model's bits per byte."""

import lzma
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

SEPARATOR = b"\n"


@dataclass(frozen=True)
class XzScore:
    """Bits per byte of ``xz -9`` on a text: alone, and with a head start (after it has seen the training text)."""

    alone: float
    head_start: float


def xz_score(held_out: Iterable[str], training: Iterable[str]) -> XzScore:
    """Compresses the held-out text alone, and behind the training text, whose own compressed size is taken off.

    The window of ``xz -9`` is 64 MiB: of a longer training text only the last part helps.
    """
    text = [t.encode() for t in held_out]
    size = sum(map(len, text))
    before = [t.encode() for t in training]
    with ThreadPoolExecutor(3) as pool:  # the compressor releases the interpreter's lock
        alone, start, both = pool.map(_compressed_size, [text, before, before + text])
    return XzScore(8 * alone / size, 8 * (both - start) / size)


def _compressed_size(texts: list[bytes]) -> int:
    compressor = lzma.LZMACompressor(preset=9)
    return sum(len(compressor.compress(t + SEPARATOR)) for t in texts) + len(compressor.flush())
