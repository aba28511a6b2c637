"""In which order threads run and asynchronous work lands. A seed fixes all of it."""

from __future__ import annotations

import random
from dataclasses import dataclass

ORDERS = ("in order", "random", "ahead")
ASYNCHRONOUS = ("eager", "lazy", "random")


@dataclass(frozen=True)
class Schedule:
    """One way to run a kernel. Its repr, which reports show, is Python that makes it again.

    Parameters
    ----------
    order : str
        ``"in order"``: each warp runs as far as it can, the first one first. ``"random"``: after every
        wait any thread may go on. ``"ahead"``: one warp runs far ahead of the others, now and then another one.
        In the last two, blocks start in a random order as well.
    asynchronous : str
        When copies and products land: ``"eager"`` at once, ``"lazy"`` when something waits for them, ``"random"``
        some time between.
    resident : int
        How many blocks run at once, 1 to 4.
    seed : int
    """

    order: str = "in order"
    asynchronous: str = "eager"
    resident: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        if self.order not in ORDERS:
            raise ValueError(f"order={self.order!r}: one of {ORDERS}")
        if self.asynchronous not in ASYNCHRONOUS:
            raise ValueError(f"asynchronous={self.asynchronous!r}: one of {ASYNCHRONOUS}")
        if not 1 <= self.resident <= 4:
            raise ValueError(f"resident={self.resident}: 1 to 4 blocks")

    @staticmethod
    def draw(seed: int) -> Schedule:
        """A schedule that depends on the seed alone; 0 is the simplest one."""
        if seed == 0:
            return Schedule()
        pick = random.Random(seed)
        return Schedule(pick.choice(ORDERS), pick.choice(ASYNCHRONOUS), pick.randint(1, 4), seed)


SIMPLEST = Schedule()
