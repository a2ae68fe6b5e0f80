"""What a run has to tell, as Markdown."""

import statistics
from collections.abc import Iterator, Sequence

from tests.chaos.driver import Injected
from tests.chaos.run import Outcome


def write(outcome: Outcome) -> str:
    """Return the report: the table of faults, the numbers, and the complaints of the gate."""
    return "\n".join(_lines(outcome))


def _lines(outcome: Outcome) -> Iterator[str]:
    verdict = outcome.verdict
    yield f"Seed {outcome.seed}, {outcome.seconds:g} seconds, {len(outcome.injected)} faults, {outcome.jobs} jobs."
    yield ""
    yield "| fault | times | held, s | done when submitted at its beginning, s | … at its end, s |"
    yield "|---|---|---|---|---|"
    for name in sorted({injected.name for injected in outcome.injected}):
        yield _row(name, [injected for injected in outcome.injected if injected.name == name])
    yield ""
    yield "Held is p50; the last two columns are p50 / max."
    yield ""
    yield f"- Jobs: {_counted(verdict.states)}."
    yield f"- Strikes: {_counted(verdict.strikes)}."
    yield f"- At rest after the faults: jobs {verdict.jobs_seconds:.1f} s, webhooks {verdict.webhooks_seconds:.1f} s."
    yield f"- POSTs of webhooks: {outcome.webhooks}, {outcome.progress} of them progress."
    yield f"- Objects of killed attempts that the sweep had to find: {verdict.leftovers}."
    yield f"- Workers that fell asleep between upload and commit, and woke as zombies: {outcome.woken}."
    yield f"- Answers that clients got: {_counted(outcome.answers)}."
    yield f"- Ends of processes: {_counted({f'{name} {status}': n for (name, status), n in outcome.exits.items()})}."
    yield ""
    yield "The gate: passed." if not verdict.complaints else f"The gate: {len(verdict.complaints)} complaints."
    yield from (f"- {complaint}" for complaint in verdict.complaints[:50])


def _row(name: str, injected: Sequence[Injected]) -> str:
    held = statistics.median(fault.held for fault in injected)
    through = _spread([fault.through for fault in injected if fault.through is not None])
    recovery = _spread([fault.recovery for fault in injected if fault.recovery is not None])
    return f"| {name} | {len(injected)} | {held:.1f} | {through} | {recovery} |"


def _spread(seconds: Sequence[float]) -> str:
    return f"{statistics.median(seconds):.1f} / {max(seconds):.1f}" if seconds else "–"


def _counted(counts: "dict[str, int] | dict[int, int]") -> str:
    return ", ".join(f"{name} × {count}" for name, count in sorted(counts.items(), key=lambda pair: str(pair[0])))
