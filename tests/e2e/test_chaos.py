"""A minute of chaos: see docs/chaos.md. `make chaos` takes five, with a seed of its own."""

from pathlib import Path

import pytest

from tests.chaos import report
from tests.chaos.driver import draw_plan
from tests.chaos.faults import MAKERS
from tests.chaos.run import run

SEED, SECONDS = 2026, 35.0


@pytest.mark.slow
def test_under_random_faults_nothing_is_lost_and_nothing_happens_twice(tmp_path: Path) -> None:
    outcome = run(SEED, SECONDS, tmp_path)
    told = report.write(outcome)
    print(told)  # noqa: T201 - seen only when the test fails
    assert outcome.verdict.complaints == []
    assert outcome.jobs >= 50  # hundreds where the machine has time for them
    assert {injected.name for injected in outcome.injected} == {make().name for make in MAKERS}


def test_a_seed_always_draws_the_same_plan() -> None:
    first, second = (
        [(planned.at, planned.fault.name, planned.seconds, planned.seed) for planned in draw_plan(SEED, SECONDS)]
        for _ in range(2)
    )
    assert first == second
    assert {name for _, name, _, _ in first} == {make().name for make in MAKERS}
