"""What is around the database in the model: a broker that can fail in every way, and a store of objects."""

from types import TracebackType
from typing import Self

from redis.exceptions import RedisError

from core.queue import ENOUGH_HINTS


class Broker:
    """Hints, as the real Sweeper sends and counts them. Each is a number, so that they can be told apart."""

    def __init__(self) -> None:
        self.hints: list[int] = []
        self.down = False
        self._sent = 0

    def send(self, count: int = 1) -> None:
        """As core.queue.Hints: what cannot be sent is dropped."""
        if self.down or len(self.hints) >= ENOUGH_HINTS:
            return
        for _ in range(count):
            self._sent += 1
            self.hints.append(self._sent)

    async def llen(self, key: str) -> int:
        self.check()
        return len(self.hints)

    def pipeline(self, *, transaction: bool) -> "_Pipeline":
        return _Pipeline(self)

    def check(self) -> None:
        """Answer as Redis does that is away."""
        if self.down:
            raise RedisError("down")


class _Pipeline:
    """What announcing needs; nobody listens in the model."""

    def __init__(self, broker: Broker) -> None:
        self._broker = broker

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

    def publish(self, channel: str, message: bytes) -> None:
        pass

    async def execute(self) -> None:
        self._broker.check()


class Objects:
    """The store: a result's content names the attempt that made it."""

    def __init__(self) -> None:
        self.content: dict[str, bytes] = {}

    async def write(self, key: str, data: bytes) -> None:
        self.content[key] = data

    async def delete(self, key: str) -> None:
        self.content.pop(key, None)
