"""Which tests run beside each other when pytest has several workers (`-n`)."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
from xdist.scheduler import LoadScopeScheduling  # pyright: ignore[reportMissingTypeStubs]

_PROCESSES = "tests/e2e/"


class Distribution(LoadScopeScheduling):
    """Gives each test to whichever worker is free, and those of whole processes all to one, which begins with them.

    They measure how long things take, and beside each other they would take longer.
    """

    # Not xdist's own `--dist loadgroup`: its release 3.8 finds no groups under pytest 9.2, and says nothing of it.

    def __init__(self, config: pytest.Config, log: Any) -> None:
        super().__init__(config, log)
        config.option.loadscopereorder = True  # the largest scope, which is theirs, goes first

    def add_node_collection(self, node: Any, collection: Sequence[str]) -> None:
        # Of tests with the same id xdist would run one, and say nothing of the others.
        assert len(set(collection)) == len(collection), [id for id, count in Counter(collection).items() if count > 1]
        super().add_node_collection(node, collection)

    def _split_scope(self, nodeid: str) -> str:
        return _PROCESSES if nodeid.startswith(_PROCESSES) else nodeid
