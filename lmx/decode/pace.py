"""How often the host looks at what is written: stop strings are found, and text is shown, then."""

import math
from dataclasses import dataclass

from lmx.sharding.processes import share


@dataclass(frozen=True)
class Pace:
    """Tokens between two looks.

    Attributes:
      most: as many at most; each look costs a dispatch.
      every: seconds between looks, about at the most, by the time that the last tokens took; inf: always ``most``.
    """

    most: int = 16
    every: float = math.inf

    @property
    def first(self) -> int:
        """Tokens to the first look."""
        return self.most if math.isinf(self.every) else 1

    def after(self, count: int, seconds: float) -> int:
        """Tokens to the next look, after ``count`` that took ``seconds``; all processes ask, and get one answer."""
        if math.isinf(self.every):
            return self.most
        taken = max(float(share(repr(seconds))[0]), 1e-6)
        return max(1, min(self.most, int(self.every * count / taken)))


STEADY = Pace()
"""For what is read when it is whole."""
LIVE = Pace(every=0.1)
"""For somebody who reads along."""
