"""What a client waits for: its pictures, as they come."""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass, field

from hart_runtime.common.settings import SamplingSettings
from hart_runtime.serve.errors import Refusal
from hart_runtime.serve.messages import Job
from hart_runtime.serve.models import Model
from hart_runtime.serve.requests import Asked


@dataclass(frozen=True)
class Partial:
    """A picture as it stands."""

    index: int
    """Which of the pictures."""
    number: int
    """How many came before it of this picture."""
    scale: int
    data: str


@dataclass(frozen=True)
class Complete:
    """A picture."""

    index: int
    data: str
    tokens: int
    """Of its prompt."""
    read: str | None
    """As of :class:`hart_runtime.serve.messages.Finished`."""


MOST_UNREAD = 32
"""Things told that nobody has read yet, before views of a picture give way to later ones."""
News = Partial | Complete | Refusal


@dataclass(frozen=True)
class Alike:
    """What pictures have in common that can be drawn together.

    Those who want to see them on their way are no burden on those who do not, or who look at other scales.
    """

    model: str
    size: int
    """Pixels along a side."""
    settings: SamplingSettings
    scales: frozenset[int]
    edited: bool
    """Whether they go on from given pictures, each from its own."""
    alone: int | None = None
    """Of one that is drawn by itself, since the batch that it was in failed."""


@dataclass(eq=False)
class Picture:
    """One picture of an order, waiting or being drawn."""

    order: Order
    index: int
    job: Job
    alike: Alike


class Order:
    """The pictures of a request, and what is told of them; only to be touched in the event loop."""

    def __init__(self, asked: Asked, name: str) -> None:
        self.asked, self.name = asked, name
        self.open = set(range(asked.n))
        """Pictures that are still to come."""
        self.deadline: asyncio.TimerHandle | None = None
        self._news: deque[News] = deque()
        self._came = asyncio.Event()

    @property
    def over(self) -> bool:
        return not self.open

    def tell(self, news: News) -> None:
        """Something new; who reads slowly misses views of a picture for later ones."""
        if isinstance(news, Partial) and len(self._news) >= MOST_UNREAD:
            self._news = deque(
                n for n in self._news if not (isinstance(n, Partial) and n.index == news.index)
            )
        self._news.append(news)
        self._came.set()

    async def news(self) -> News:
        """What comes next: a refusal is the last that comes."""
        while not self._news:
            self._came.clear()
            await self._came.wait()
        return self._news.popleft()


@dataclass(eq=False)
class Batch:
    """Pictures that a worker draws together."""

    number: int
    model: Model
    pictures: list[Picture]
    open: set[int] = field(default_factory=set)
    """Rows that somebody waits for."""
    began: float = 0.0
