"""What happens around every request: it gets a name, its body limits, and every answer the headers that all have."""

import re
import secrets
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Any

import anyio
from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api import errors
from core.errors import PayloadTooLarge, RequestTooSlow

SHORT_BODY_BYTES = 64 * 1024
"""How long a body may be where no image is expected in it."""

PAUSE_SECONDS = 20.0
"""How long nothing may come of a body that is not whole."""

GRACE_SECONDS = 20.0
MIN_BYTES_PER_SECOND = 1024
"""A body that has been waited for longer than the grace, in all, must have come at least this fast."""

SAFE_HEADERS: Mapping[str, str] = {
    # What we say it is, it is: nobody is to find a script in a picture, or a page in an error.
    "x-content-type-options": "nosniff",
    "content-security-policy": "default-src 'none'; frame-ancestors 'none'",
    # The URL of an object is its own permission, and no other site's to see.
    "referrer-policy": "no-referrer",
    # No page of another site pulls an answer into its process by <img> or <script>; pictures are meant to be.
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}
"""What every answer says that does not say otherwise."""

HSTS = "max-age=31536000"
"""For a year browsers come by https only; not to be said by who is reached by http."""


def new_request_id() -> str:
    return f"req_{secrets.token_hex(12)}"


class Envelope:
    """Names every request, and puts on every answer what all have to say; the outermost of ours.

    A request's name is the caller's X-Request-Id when that is harmless, else one of ours; the answer repeats it. What
    `state["answer_headers"]` holds is put on the answer too, whichever that is.
    """

    def __init__(self, app: ASGIApp, https: bool) -> None:
        self._app = app
        safe = {**SAFE_HEADERS, "strict-transport-security": HSTS} if https else SAFE_HEADERS
        self._headers = _encode(safe)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if re.fullmatch(r"[\w.-]{1,64}", given, re.ASCII) else new_request_id()
        state: MutableMapping[str, Any] = scope.setdefault("state", {})
        state["request_id"] = request_id
        # Made here, so that whoever adds to it need not know whether it is the first.
        added: MutableMapping[str, str] = state.setdefault("answer_headers", {})

        async def send_enclosed(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers: list[tuple[bytes, bytes]] = list(message.get("headers", ()))
                headers += [(b"x-request-id", request_id.encode()), *_encode(added)]
                said = {name.lower() for name, _ in headers}
                headers += [header for header in self._headers if header[0] not in said]
                message = {**message, "headers": headers}
            await send(message)

        await self._app(scope, receive, send_enclosed)


def _encode(headers: Mapping[str, str]) -> list[tuple[bytes, bytes]]:
    return [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]


class LastResort:
    """Answers for what nothing further inside did: a bug, or an error that was raised beside the routes.

    Starlette has such a middleware too, but outside of all others: its answer would lack what Envelope adds.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begun = False

        async def send_watched(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            await self._app(scope, receive, send_watched)
        except ClientDisconnect:
            return  # there is nobody to answer
        except Exception as error:
            if begun:  # all that is left is to break the connection off, which the server does, and logs this
                raise
            response = await errors.answer(Request(scope), error)
            await response(scope, receive, send)


class BodyLimit:
    """Refuses bodies that are too long, by what they claim and by what comes, and bodies that come too slowly.

    Starlette limits lengths too, but its refusal is plain text and nothing can change that.

    Args:
        max_bytes: of bodies with images.
        long_bodies: the methods and paths that these have, or the beginnings of paths that end in a slash; all others
            have short bodies.
    """

    def __init__(self, app: ASGIApp, max_bytes: int, long_bodies: Sequence[tuple[str, str]]) -> None:
        self._app = app
        self._max_bytes = max_bytes
        self._long_bodies = tuple(long_bodies)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        long = any(scope["method"] == method and _leads_to(path, scope["path"]) for method, path in self._long_bodies)
        limit = self._max_bytes if long else SHORT_BODY_BYTES
        if _claims_more_than(limit, Headers(scope=scope)):
            response = await errors.answer(Request(scope), _too_large(limit))
            await response(scope, receive, send)
            return
        begun = False

        async def send_watched(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        await self._app(scope, _limited(receive, limit, lambda: begun), send_watched)


def _leads_to(path: str, given: str) -> bool:
    return given.startswith(path) if path.endswith("/") else given == path


def _claims_more_than(limit: int, headers: Headers) -> bool:
    claimed = headers.get("content-length", "").lstrip("0")
    return claimed.isdecimal() and (len(claimed) > len(str(limit)) or int(claimed) > limit)


def _too_large(limit: int) -> PayloadTooLarge:
    return PayloadTooLarge(f"The request is larger than {limit} bytes.")


def _limited(receive: Receive, limit: int, answering: Callable[[], bool]) -> Receive:
    """Return a `receive` that raises once its body is longer than `limit`, or comes too slowly.

    While it is being answered nothing of that matters: what still comes is thrown away by whoever asks for it.
    """
    seen_bytes, waited_seconds, whole = 0, 0.0, False

    async def receive_limited() -> Message:
        nonlocal seen_bytes, waited_seconds, whole
        if whole:  # who goes on asking waits for the connection's end
            return await receive()
        began = anyio.current_time()
        with anyio.move_on_after(PAUSE_SECONDS):
            message = await receive()
            waited_seconds += anyio.current_time() - began
            seen_bytes += len(message.get("body", b""))
            whole = not message.get("more_body", False)
            if answering():
                return message
            if seen_bytes > limit:
                raise _too_large(limit)
            if whole or waited_seconds < GRACE_SECONDS or seen_bytes >= waited_seconds * MIN_BYTES_PER_SECOND:
                return message
        if answering():
            return await receive()
        raise RequestTooSlow("The request came in too slowly.")

    return receive_limited
