"""What routes ask for: the parts of the process, and a caller who may use them."""

from collections.abc import Callable, Coroutine
from contextlib import aclosing
from dataclasses import dataclass
from datetime import timedelta
from typing import Annotated, Any

import anyio.to_thread
from fastapi import Depends, Header, Request, Response
from fastapi.dependencies.models import Dependant
from fastapi.routing import APIRoute
from fastapi.security import APIKeyHeader, HTTPBearer
from pydantic import BaseModel
from redis.asyncio import Redis
from starlette.datastructures import Headers

from api.headers import add_to_answer, read_cancel_after, read_idempotency_key
from api.intake import Idempotency, Intake, fingerprint
from api.keyring import KeyRing
from api.rates import Rates
from api.room import Room
from api.waiting import Watch
from core.errors import Forbidden, InvalidApiKey, MissingApiKey, ValidationError
from core.sealing import Sealer
from core.settings import Settings
from core.storage import Storage
from db.keys import KeyRecord
from db.models import Scope
from db.session import Database


@dataclass(frozen=True)
class Parts:
    """The parts of one API process; `app.state.parts` holds them."""

    settings: Settings
    database: Database
    storage: Storage
    redis: Redis
    intake: Intake
    key_ring: KeyRing
    watch: Watch
    sealer: Sealer
    rates: Rates
    room: Room


async def _parts(request: Request) -> Parts:  # async, or FastAPI would hand each call to a thread
    return request.app.state.parts


PartsDep = Annotated[Parts, Depends(_parts)]

_API_KEY = APIKeyHeader(name="X-API-Key", auto_error=False, description="An API key.")
_BEARER = HTTPBearer(auto_error=False, description="The same API key, for clients that send no other header.")


@dataclass(frozen=True)
class Need:
    """A route's need of a caller whose key has a scope; only a KeyedRoute can have one."""

    scope: Scope

    async def __call__(
        self, request: Request, _api_key: Annotated[Any, Depends(_API_KEY)], _bearer: Annotated[Any, Depends(_BEARER)]
    ) -> KeyRecord:
        """Return whom KeyedRoute has admitted. The two parameters only tell the OpenAPI document."""
        return request.state.caller


ReaderDep = Annotated[KeyRecord, Depends(Need(Scope.JOBS_READ))]
WriterDep = Annotated[KeyRecord, Depends(Need(Scope.JOBS_WRITE))]
AdminDep = Annotated[KeyRecord, Depends(Need(Scope.ADMIN))]


MAX_JSON_COMMAS = 10_000
"""How many commas may be in a body of JSON, those of prompts among them: more than in any request that makes sense. A
list or an object of millions is parsed into gigabytes, and each of its items complained of."""


class _Request(Request):
    """A request whose body takes room while it is gathered, and whose JSON is looked at before it is parsed."""

    def __init__(self, request: Request, take: Callable[[int], None]) -> None:
        super().__init__(request.scope, request.receive)
        self._take = take

    async def body(self) -> bytes:
        if not hasattr(self, "_body"):
            chunks: list[bytes] = []
            async with aclosing(self.stream()) as stream:
                async for chunk in stream:
                    self._take(len(chunk))
                    chunks.append(chunk)
            self._body = b"".join(chunks)
        return self._body

    async def json(self) -> Any:
        body = await self.body()
        if body.count(b",") > MAX_JSON_COMMAS:
            raise ValidationError({"body": ["holds too many values"]})
        return await super().json()


class KeyedRoute(APIRoute):
    """Admits the caller that its function needs, before any of the body is read.

    FastAPI reads and parses a body before it looks at dependencies: with them alone, strangers could let us gather all
    the megabytes that a body may have.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle, need = super().get_route_handler(), need_of(self.dependant)
        if need is None:
            return handle

        async def admit_and_handle(request: Request) -> Response:
            request.state.caller = await _admit(request, need.scope)
            parts: Parts = request.app.state.parts
            with parts.room.lend(request.state.caller.id) as take:
                return await handle(_Request(request, take))

        return admit_and_handle


def need_of(dependant: Dependant) -> Need | None:
    """Return what a route needs of its caller, None when it is open to everyone."""
    if isinstance(dependant.call, Need):
        return dependant.call
    return next((need for needed in dependant.dependencies if (need := need_of(needed))), None)


async def _admit(request: Request, scope: Scope) -> KeyRecord:
    """Return the caller; raises when there is no key, or it may not do this, or not so often."""
    parts: Parts = request.app.state.parts
    try:
        caller = await parts.key_ring.find(_given_key(request.headers))
    except (MissingApiKey, InvalidApiKey):
        add_to_answer(request, {"WWW-Authenticate": "Bearer"})
        raise
    add_to_answer(request, await parts.rates.take(caller))
    if not caller.may(scope):
        raise Forbidden(f"This API key lacks the scope {scope}.")
    return caller


async def readmit(request: Request) -> None:
    """Look once more at the caller's key, for an answer that is long in the making.

    Raises:
        KeyInactive: it was revoked meanwhile, or has expired.
        DatabaseUnavailable: nobody knows.
    """
    parts: Parts = request.app.state.parts
    await parts.key_ring.find(_given_key(request.headers))


def _given_key(headers: Headers) -> str:
    scheme, _, credentials = headers.get("authorization", "").partition(" ")
    bearer = credentials.strip() if scheme.lower() == "bearer" else ""
    key = headers.get("x-api-key") or bearer
    if not key:
        raise MissingApiKey("API key is required")
    return key


@dataclass(frozen=True)
class SubmitHeaders:
    """What any dialect's submit can say in headers."""

    idempotency_key: str | None
    cancel_after: timedelta | None

    async def idempotency(self, path: str, body: BaseModel) -> Idempotency | None:
        """Return what tells this request from others, None when it carries no Idempotency-Key.

        The body is that which was validated, so a field that is given its default is the same as none.
        """
        if self.idempotency_key is None:
            return None
        digest = await anyio.to_thread.run_sync(lambda: fingerprint(path, body.model_dump(mode="json")))
        return Idempotency(self.idempotency_key, digest)


async def _submit_headers(
    idempotency_key: Annotated[
        str | None, Header(description="The same key and request within 24 hours give the same job.")
    ] = None,
    cancel_after: Annotated[
        str | None, Header(description="Cancel the job unless it is done in time: 90s, 5m, 1h30m.")
    ] = None,
) -> SubmitHeaders:
    return SubmitHeaders(read_idempotency_key(idempotency_key), read_cancel_after(cancel_after))


SubmitHeadersDep = Annotated[SubmitHeaders, Depends(_submit_headers)]
