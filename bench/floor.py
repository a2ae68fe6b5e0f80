"""The floor: the very statements of a job's life, sent by pgbench, with no HTTP and no Python between them."""

import asyncio
import re
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any
from uuid import UUID, uuid4

from sqlalchemy import event

from cli.embedded.postgres import postgres_binaries
from core.options import OutputFormat, UpscaleOptions
from core.settings import Settings
from db import jobs, queue, workers
from db.jobs import Result
from db.queue import NewJob
from db.session import Database

BACKLOG = 1000
"""Jobs that stay queued throughout: a claim that comes back empty would end pgbench."""

SHARD = 13
"""A number that occurs as nothing else in the statements."""


@dataclass(frozen=True)
class Floor:
    """What pgbench reached with so many clients."""

    submits_per_second: float
    lives_per_second: float


def measure_floor(settings: Settings, key_id: UUID, clients: int, seconds: float) -> Floor:
    """Run one insert per transaction, then one whole life (submit, claim, complete: three), each for `seconds`."""
    submit, claim, complete = asyncio.run(_statements(settings, key_id, clients))
    return Floor(
        submits_per_second=_pgbench(settings, f"{submit};\n", clients, seconds),
        lives_per_second=_pgbench(settings, f"{submit};\n{claim} \\gset\n{complete};\n", clients, seconds),
    )


async def _statements(settings: Settings, key_id: UUID, clients: int) -> Sequence[str]:
    """Carry one job through its life and return the SQL that was sent, its values written out for pgbench."""
    database, sent = Database(settings), list[str]()
    # Each client is a worker of its own, and counts where its job's id would have it count.
    job_id, worker_id, key = UUID(int=uuid4().int & ~15 | SHARD), uuid4(), "results/floor/1.png"
    variables: Mapping[Any, str] = {
        job_id: "gen_random_uuid()",
        worker_id: "(SELECT id FROM workers WHERE name = 'floor' ORDER BY id OFFSET :client_id LIMIT 1)",
        SHARD: "(:client_id % 16)",
    }

    def note(_c: Any, _cursor: Any, statement: str, parameters: Sequence[Any], *_: Any) -> None:
        sent.append(_written_out(statement, parameters, variables))

    job = NewJob(
        id=job_id, api_key_id=key_id, model="clarity-upscale", input={}, options=UpscaleOptions(), image_key="floor"
    )
    result = Result(engine="floor", format=OutputFormat.PNG, width=1, height=1, size_bytes=1, sha256="0" * 64, seed=1)
    async with database.connection() as connection:
        for number in range(clients):
            await workers.register(connection, uuid4() if number else worker_id, "floor", "floor")
        event.listen(connection.sync_connection, "before_cursor_execute", note)
        await queue.submit(connection, job, 10 * BACKLOG**2)
        attempt = None
        while attempt is None or attempt.job_id != job_id:
            del sent[1:]
            attempt = await queue.claim(connection, worker_id, "floor")
        variables = {**variables, job_id: ":id", attempt.number: ":attempt"}
        await jobs.complete(connection, attempt, result, key, timedelta(hours=1))
    await database.close()
    return sent


def _written_out(statement: str, parameters: Sequence[Any], variables: Mapping[Any, str]) -> str:
    def value(match: re.Match[str]) -> str:
        parameter = parameters[int(match[1]) - 1]
        if isinstance(parameter, (int, UUID)) and parameter in variables:
            return variables[parameter]
        if parameter is None:
            return "NULL"
        if isinstance(parameter, list):
            return "'{}'"
        if isinstance(parameter, timedelta):
            return f"'{parameter.total_seconds()} seconds'"
        return "'" + str(parameter).replace("'", "''") + "'"

    return " ".join(re.sub(r"\$(\d+)", value, statement).split())


def _pgbench(settings: Settings, script: str, clients: int, seconds: float) -> float:
    """Return transactions of the script per second."""
    url = settings.database_url.replace("+asyncpg", "")
    with tempfile.NamedTemporaryFile("w", suffix=".sql") as file:
        file.write(script)
        file.flush()
        command = [
            str(postgres_binaries() / "pgbench"),
            *("--no-vacuum", "--protocol=prepared", f"--client={clients}", "--jobs=2"),
            *(f"--time={seconds:.0f}", f"--file={file.name}", url),
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    match = re.search(r"^tps = ([\d.]+)", done.stdout, re.MULTILINE)
    if done.returncode != 0 or match is None:
        raise RuntimeError(f"pgbench failed: {done.stderr[-2000:]}")
    return float(match[1])
