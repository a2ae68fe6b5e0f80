"""How attempts end, and jobs with them: each change of a job's state is one guarded statement, here or in db.queue.

Each change is a single SQL statement, so it is a transaction by itself; what must happen together with it, like the
delivery that reports it, is part of the same statement. `attempt` is the fence: whoever ends an attempt names it.
"""

from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any, TypeAlias
from uuid import UUID

from sqlalchemy import (
    BigInteger,
    ColumnElement,
    Integer,
    Interval,
    Select,
    SmallInteger,
    Text,
    Update,
    and_,
    any_,
    bindparam,
    case,
    cast,
    delete,
    false,
    func,
    literal,
    null,
    or_,
    select,
    update,
)
from sqlalchemy.dialects.postgresql import JSONB, insert
from sqlalchemy.ext.asyncio import AsyncConnection

from core.errors import (
    DeadlineExceeded,
    JobNotCancellable,
    LeaseLost,
    NotFound,
    Stopped,
    UploadFailed,
    UpscaledError,
    WorkerLost,
)
from core.options import OutputFormat
from db import usage
from db.models import PROCESSING, QUEUED, Delivery, Job, JobStatus, Tally, Worker
from db.records import OVER

Statement: TypeAlias = Select[*tuple[Any, ...]]

PURGE_AFTER = timedelta(hours=1)
"""How long the objects lie that a job left which ended without a result: no attempt of it can still be writing then."""

BURIED_AT_ONCE = 200
"""How many jobs of dead workers one statement gives to others."""

NO_CHANGES: dict[str, Any] = {}

UNNAMED_LEASE = timedelta(hours=1)
"""When to give up on a job whose worker, being of the release before, left no id."""


@dataclass(frozen=True, slots=True)
class Attempt:
    """One claim of a job by one worker; `number` is the fence."""

    job_id: UUID
    number: int
    options: dict[str, Any]
    """As stored; whoever runs the attempt validates them, so that what cannot be read ends the job it belongs to."""
    image_url: str | None
    image_key: str | None
    cost: float
    strikes: int
    wants_progress: bool
    """Whether a webhook is to be told of progress."""
    upload_url: str | None = None
    """Where the caller wants the result put."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """What is known about a stored result."""

    engine: str
    format: OutputFormat
    width: int
    height: int
    size_bytes: int
    sha256: str
    seed: int


@dataclass(frozen=True, slots=True)
class Changed:
    """A job whose state was changed, and the state it has now."""

    id: UUID
    status: JobStatus


async def complete(
    connection: AsyncConnection,
    attempt: Attempt,
    result: Result,
    result_key: str,
    ttl: timedelta,
    failure: UploadFailed | None = None,
) -> None:
    """End the attempt with a stored result that can be read for `ttl`; saying it twice changes nothing.

    With a `failure` the job fails by it, and the result can be read all the same.

    Raises:
        LeaseLost: the attempt is no longer current; nothing was changed and its object belongs to nobody.
        Stopped: the caller has asked to cancel the job; nothing was changed, and the attempt is to be handed back.
    """
    end = JobStatus.FAILED if failure else JobStatus.COMPLETED
    values = {
        "key": result_key,
        "known": asdict(result),
        "ttl": ttl,
        "end": end.value,
        "sentence": failure and str(failure),
        "code": failure and failure.code,
    }
    await _end(connection, attempt, _COMPLETE, values, end)


async def require_wanted(connection: AsyncConnection, attempt: Attempt) -> None:
    """Make sure that somebody waits for what the attempt is about to do outside of here.

    Raises:
        LeaseLost: the attempt is no longer current.
        Stopped: the caller has asked to cancel the job, or its deadline has passed.
    """
    late = func.coalesce(Job.deadline_at <= func.now(), false())
    found = select(or_(_UNWANTED, late)).where(_CURRENT)
    unwanted = (await connection.execute(found, _fence(attempt))).scalar_one_or_none()
    if unwanted is None:
        raise _lost(attempt)
    if unwanted:
        raise Stopped("The caller has asked to cancel this job, or its deadline has passed.")


async def fail(connection: AsyncConnection, attempt: Attempt, error: UpscaledError) -> None:
    """End the attempt with an error whose sentence and code the caller will read; saying it twice changes nothing.

    A job whose caller asked to cancel it is cancelled all the same.

    Raises:
        LeaseLost: the attempt is no longer current; nothing was changed.
    """
    values = {"sentence": str(error), "code": error.code}
    await _end(connection, attempt, _FAIL, values, JobStatus.FAILED, JobStatus.CANCELLED)


async def hand_back(
    connection: AsyncConnection,
    attempt: Attempt,
    max_strikes: int,
    *,
    fault: UpscaledError | None = None,
    pause: timedelta = timedelta(0),
    small_tiles: bool = False,
) -> JobStatus:
    """Give up the attempt, so that the job is claimed again after `pause`; return the state that it has now.

    A `fault` is a strike, and the last strike fails the job with it; without one, as in a drain, there is no strike.
    A job whose caller asked to cancel it, or whose deadline has passed, is cancelled instead.

    Raises:
        LeaseLost: the attempt is no longer current; nothing was changed.
    """
    values = _handing_back(fault or WorkerLost(""), max_strikes) | {
        "strike": int(fault is not None),
        "pause": pause,
        "changes": {"small_tiles": True} if small_tiles else NO_CHANGES,
    }
    changed = (await connection.execute(_HAND_BACK, _fence(attempt) | values)).one_or_none()
    if changed is None:
        raise _lost(attempt)
    return JobStatus(changed.status)


async def bury(connection: AsyncConnection, lease: timedelta, max_strikes: int) -> list[Changed]:
    """Forget the workers that have been silent for longer than `lease`, and take their jobs back, each with a strike.

    Return those jobs, at most BURIED_AT_ONCE. A worker that only slept finds itself forgotten, and its attempt lost.
    """
    await connection.execute(_FORGET, {"lease": lease})
    error = WorkerLost("The workers that took this job died or stopped answering, one after the other.")
    values = {"strike": 1, "pause": timedelta(0), "changes": NO_CHANGES, "unnamed_lease": UNNAMED_LEASE, "shard": 0}
    return _changed(await connection.execute(_BURY, _handing_back(error, max_strikes) | values))


async def expire(connection: AsyncConnection) -> list[Changed]:
    """Cancel the queued jobs whose deadline has passed, and return them."""
    error = DeadlineExceeded("The deadline passed before the job was done.")
    return _changed(await connection.execute(_EXPIRE, {"sentence": str(error), "code": error.code, "shard": 0}))


async def cancel(connection: AsyncConnection, job_id: UUID, api_key_id: UUID) -> UUID | None:
    """Cancel a queued job at once, and ask that a running one be stopped; saying it twice changes nothing.

    Return the worker that is to be told, if any.

    Raises:
        NotFound: there is no such job under that key.
        JobNotCancellable: the job is over.
    """
    values = {"job_id": job_id, "owner": api_key_id, "shard": _shard(job_id)}
    changed = (await connection.execute(_CANCEL, values)).one_or_none()
    if changed is not None:
        return changed.worker_id if changed.status == JobStatus.PROCESSING else None
    status = (
        await connection.execute(select(Job.status).where(Job.id == job_id, Job.api_key_id == api_key_id))
    ).scalar_one_or_none()
    if status is None:
        raise NotFound("Job not found")
    if status != JobStatus.CANCELLED:
        raise JobNotCancellable(f"The job is over: {status}.")
    return None


def _fence(attempt: Attempt) -> dict[str, Any]:
    return {"job_id": attempt.job_id, "number": attempt.number, "shard": _shard(attempt.job_id)}


def _shard(job_id: UUID) -> int:
    return job_id.int % 16


def _lost(attempt: Attempt) -> LeaseLost:
    return LeaseLost(f"Attempt {attempt.number} no longer owns job {attempt.job_id}.")


def _handing_back(error: UpscaledError, max_strikes: int) -> dict[str, Any]:
    late = DeadlineExceeded("The deadline passed before the job was done.")
    return {
        "max_strikes": max_strikes,
        "sentence": str(error),
        "code": error.code,
        "late_sentence": str(late),
        "late_code": late.code,
    }


def _changed(rows: Any) -> list[Changed]:
    return [Changed(row.id, JobStatus(row.status)) for row in rows]


async def _end(
    connection: AsyncConnection, attempt: Attempt, ending: Statement, values: dict[str, Any], *ends: JobStatus
) -> None:
    if (await connection.execute(ending, _fence(attempt) | values)).one_or_none() is not None:
        return
    found = select(Job.status).where(Job.id == attempt.job_id, Job.attempt == attempt.number)
    now = (await connection.execute(found)).scalar_one_or_none()
    # An earlier call may have been committed though its answer was lost: then this one is a repetition, and true.
    if now in ends:
        return
    if now == JobStatus.PROCESSING:
        raise Stopped("The caller has asked to cancel this job.")
    raise _lost(attempt)


_CURRENT = and_(Job.id == bindparam("job_id"), Job.attempt == bindparam("number"), Job.status == PROCESSING)


_UNWANTED = Job.cancel_requested_at.is_not(None)


def _change(change: Update, *, makes: bool = False) -> Statement:
    """Return the statement that makes a change and, by the same stroke, counts what it ends and owes its events.

    Args:
        makes: it gives a job its result, whose pixels are counted for the job's key.
    """
    columns = [Job.id, Job.status, Job.worker_id, Job.webhook_url, Job.webhook_events, Job.api_key_id, Job.result]
    changed = change.returning(*columns).cte("changed")
    over, event = changed.c.status.in_([status.value for status in OVER]), func.lower(changed.c.status)
    wanted = and_(over, changed.c.webhook_url.is_not(None), event == any_(changed.c.webhook_events))
    receiver = func.substring(changed.c.webhook_url, "^[A-Za-z]+://[^/?#]+")
    owed = insert(Delivery).from_select(
        ["job_id", "event", "url", "receiver"],
        select(changed.c.id, event, changed.c.webhook_url, func.coalesce(receiver, "")).where(wanted),
    )
    shard = bindparam("shard", type_=SmallInteger)
    ended = select(event, shard, func.count()).where(over).group_by(changed.c.status)
    effects = [owed.cte("owed"), tally(ended).cte("tallied")]
    if makes:
        width, height = (cast(changed.c.result[side].astext, BigInteger) for side in ("width", "height"))
        made = select(changed.c.api_key_id, usage.TODAY, shard, func.count(), func.sum(width * height))
        made = made.where(over, changed.c.result.is_not(None))
        effects.append(usage.added(made.group_by(changed.c.api_key_id)).cte("used"))
    return select(changed.c.id, changed.c.status, changed.c.worker_id).add_cte(*effects)


def tally(counted: Statement) -> Any:
    """Return the statement that adds rows of (name, shard, count) to the tallies."""
    added = insert(Tally).from_select(["name", "shard", "count"], counted)
    return added.on_conflict_do_update(
        index_elements=[Tally.name, Tally.shard], set_={"count": Tally.count + added.excluded.count}
    )


_COMPLETE = _change(
    update(Job)
    .where(_CURRENT, Job.cancel_requested_at.is_(None))
    .values(
        status=bindparam("end", type_=Text),
        completed_at=func.now(),
        upload_url=None,
        result_key=bindparam("key", type_=Text),
        result=bindparam("known", type_=JSONB),
        error=bindparam("sentence", type_=Text),
        error_code=bindparam("code", type_=Text),
        expires_at=func.now() + bindparam("ttl", type_=Interval),
        purge_at=func.now() + bindparam("ttl", type_=Interval),
    ),
    makes=True,
)

_FAIL = _change(
    update(Job)
    .where(_CURRENT)
    .values(
        # Whoever asked to cancel was told that the job would stop, and so it does.
        status=case((_UNWANTED, literal(JobStatus.CANCELLED.value)), else_=literal(JobStatus.FAILED.value)),
        completed_at=func.now(),
        upload_url=None,
        error=case((~_UNWANTED, bindparam("sentence", type_=Text))),
        error_code=case((~_UNWANTED, bindparam("code", type_=Text))),
        purge_at=func.now() + PURGE_AFTER,
    )
)


def _hand_back(whose: ColumnElement[bool]) -> Statement:
    """Return the statement that takes attempts away: their jobs are cancelled, failed or queued again."""
    strike = bindparam("strike", type_=SmallInteger)
    late = and_(Job.cancel_requested_at.is_(None), Job.deadline_at <= func.now())
    unwanted = or_(Job.cancel_requested_at.is_not(None), Job.deadline_at <= func.now())
    spent = and_(strike > 0, Job.strikes + strike >= bindparam("max_strikes", type_=Integer))
    over = or_(unwanted, spent)
    said = [
        case(
            (late, bindparam(f"late_{name}", type_=Text)),
            (unwanted, null()),
            (spent, bindparam(name, type_=Text)),
        )
        for name in ("sentence", "code")
    ]
    return _change(
        update(Job)
        .where(whose, Job.status == PROCESSING)
        .values(
            status=case(
                (unwanted, literal(JobStatus.CANCELLED.value)),
                (spent, literal(JobStatus.FAILED.value)),
                else_=literal(JobStatus.QUEUED.value),
            ),
            strikes=Job.strikes + strike,
            # A worker of the release before would not overwrite these.
            worker_id=case((over, Job.worker_id)),
            slot=case((over, Job.slot)),
            due_at=func.now() + bindparam("pause", type_=Interval),
            started_at=case((over, Job.started_at)),
            completed_at=case((over, func.now())),
            upload_url=case((over, null()), else_=Job.upload_url),
            purge_at=case((over, func.now() + PURGE_AFTER)),
            options=Job.options.op("||")(bindparam("changes", type_=JSONB)),
            error=said[0],
            error_code=said[1],
        )
    )


_HAND_BACK = _hand_back(_CURRENT)

_FORGET = delete(Worker).where(Worker.beat_at < func.now() - bindparam("lease", type_=Interval))

_BURY = _hand_back(
    Job.id.in_(
        select(
            select(Job.id)
            .where(
                Job.status == PROCESSING,
                ~select(Worker.id).where(Worker.id == Job.worker_id).exists(),
                or_(
                    Job.worker_id.is_not(None),
                    Job.started_at < func.now() - bindparam("unnamed_lease", type_=Interval),
                ),
            )
            .limit(BURIED_AT_ONCE)
            .with_for_update(skip_locked=True)
            .cte("orphans")
            .c.id
        )
    )
)

_EXPIRE = _change(
    update(Job)
    .where(Job.status == QUEUED, Job.deadline_at <= func.now())
    .values(
        status=JobStatus.CANCELLED.value,
        completed_at=func.now(),
        upload_url=None,
        error=bindparam("sentence", type_=Text),
        error_code=bindparam("code", type_=Text),
        purge_at=func.now() + PURGE_AFTER,
    )
)

_WAITS = Job.status == QUEUED

_CANCEL = _change(
    update(Job)
    .where(
        Job.id == bindparam("job_id"),
        Job.api_key_id == bindparam("owner"),
        Job.status.in_([QUEUED, PROCESSING]),
    )
    .values(
        status=case((_WAITS, literal(JobStatus.CANCELLED.value)), else_=Job.status),
        cancel_requested_at=func.coalesce(Job.cancel_requested_at, func.now()),
        completed_at=case((_WAITS, func.now())),
        upload_url=case((_WAITS, null()), else_=Job.upload_url),
        purge_at=case((_WAITS, func.now() + PURGE_AFTER)),
    )
)
