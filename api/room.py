"""The memory that bodies of requests take while they are answered."""

from collections.abc import Callable, Generator
from contextlib import contextmanager
from uuid import UUID

from core.errors import TransientError

MIN_BYTES = 512 * 1024 * 1024


class Room:
    """Counts what is gathered of bodies in this process, and refuses more than there is room for.

    A body is held several times over until it is answered, as it came, parsed and decoded, and callers choose how many
    they send at once, and how slowly. No key can take more than half, so that one that does leaves room for others.

    Args:
        max_body_bytes: how long one body may be; there is room for several of them in any case.
    """

    def __init__(self, max_body_bytes: int) -> None:
        self._max_bytes = max(MIN_BYTES, 4 * max_body_bytes)
        self._held: dict[UUID, int] = {}

    @property
    def held_bytes(self) -> int:
        """How many bytes are gathered at the moment."""
        return sum(self._held.values())

    @contextmanager
    def lend(self, api_key_id: UUID) -> Generator[Callable[[int], None]]:
        """Yield what is to be called with the length of each piece of a key's request; all is given back at the end.

        What is yielded raises TransientError where there is no room for the piece.
        """
        taken = 0

        def take(count: int) -> None:
            nonlocal taken
            own = self._held.get(api_key_id, 0) + count
            if own > self._max_bytes // 2 or self.held_bytes + count > self._max_bytes:
                raise TransientError("The service has too many large requests at the moment.")
            self._held[api_key_id] = own
            taken += count

        try:
            yield take
        finally:
            left = self._held.get(api_key_id, 0) - taken
            if left:
                self._held[api_key_id] = left
            else:
                self._held.pop(api_key_id, None)
