"""Named points in the life of an attempt at which a test can make its process die, or anything else happen."""

from collections.abc import Callable

POINTS = ("after_pop", "after_claim", "mid_step", "during_upload", "after_upload", "after_commit")
"""A hint was taken; a job is ours; the engine is at work; half the result is stored; all of it; the job is over."""

_armed: dict[str, Callable[[], object]] = {}


def arm(point: str, act: Callable[[], object]) -> None:
    """Let `act` happen whenever this process reaches `point`."""
    if point not in POINTS:
        raise ValueError(f"There is no fail-point {point!r}")
    _armed[point] = act


def disarm() -> None:
    """Let nothing happen anywhere."""
    _armed.clear()


def reach(point: str) -> None:
    """Say that the process is at `point`; costs next to nothing while nothing is armed."""
    if _armed and (act := _armed.get(point)) is not None:
        act()
