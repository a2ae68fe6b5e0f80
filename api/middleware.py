"""What happens around every request: it gets a name, and its body a limit."""

import re
import secrets
from collections.abc import MutableMapping
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send


class RequestId:
    """Names every request: the caller's X-Request-Id when it is harmless, else one of ours; the answer repeats it."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if re.fullmatch(r"[\w.-]{1,64}", given) else f"req_{secrets.token_hex(12)}"
        state: MutableMapping[str, Any] = scope.setdefault("state", {})
        state["request_id"] = request_id

        async def send_named(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["X-Request-Id"] = request_id
            await send(message)

        await self._app(scope, receive, send_named)


class BodyLimit:
    """Refuses a body longer than `max_bytes`, by what it claims and by what comes.

    Starlette has such a middleware too, but its refusal is plain text and nothing can change that.
    """

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        claimed = Headers(scope=scope).get("content-length", "")
        too_long = claimed.isdecimal() and int(claimed) > self._max_bytes
        seen_bytes = 0

        async def receive_limited() -> Message:
            nonlocal too_long, seen_bytes
            if not too_long:
                message = await receive()
                seen_bytes += len(message.get("body", b""))
                too_long = seen_bytes > self._max_bytes
                if not too_long:
                    return message
            raise HTTPException(413, f"The request is larger than {self._max_bytes} bytes.")

        await self._app(scope, receive_limited, send)
