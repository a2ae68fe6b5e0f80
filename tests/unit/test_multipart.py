"""Forms, as they arrive."""

from collections.abc import AsyncGenerator, Iterable

import pytest
from starlette.requests import Request
from starlette.types import Message

from api.multipart import MAX_PARTS, read_file
from core.errors import RequestError, ValidationError

pytestmark = pytest.mark.anyio

FORM = "multipart/form-data; boundary=limit"

FILE = b'--limit\r\ncontent-disposition: form-data; name="file"; filename="a.png"\r\nContent-Type: image/png\r\n\r\n'
NAMELESS = b"--limit\r\nContent-Type: image/png\r\n\r\n"
TEXT = b'--limit\r\nContent-Disposition: form-data; name="file"\r\n\r\n'
NOTE = b'--limit\r\nContent-Disposition: form-data; name="note"\r\n\r\nfile\r\n'
OTHER_FILE = b'--limit\r\nContent-Disposition: form-data; name="other"; filename="file"\r\n\r\nno\r\n'
END = b"\r\n--limit--\r\n"

DATA = b"\r\n--limi\r\n\r\n-- \0\xff--limit--\r\n--limi"


def _file(body: Iterable[bytes], content_type: str | None = FORM, *, closed: bool = False) -> AsyncGenerator[bytes]:
    messages: list[Message] = [{"type": "http.request", "body": part, "more_body": True} for part in body]
    messages.append({"type": "http.disconnect"} if closed else {"type": "http.request"})

    async def receive() -> Message:
        return messages.pop(0)

    headers = [(b"content-type", content_type.encode("latin-1"))] if content_type else []
    return read_file(Request({"type": "http", "headers": headers}, receive), "file")


async def _whole(*body: bytes) -> bytes:
    return b"".join([piece async for piece in _file(body)])


async def test_a_file_is_read_whole_however_the_body_is_cut() -> None:
    body = (
        b"\r\n" + NOTE + OTHER_FILE + NAMELESS + b"x\r\n" + FILE + DATA + b"\r\n" + NAMELESS + b"x" + END + b"epilogue"
    )
    assert await _whole(body) == DATA
    assert await _whole(*(body[i : i + 1] for i in range(len(body)))) == DATA
    for cut in range(len(body)):
        assert await _whole(body[:cut], body[cut:]) == DATA


async def test_what_has_come_is_passed_on_before_the_rest_comes() -> None:
    file = _file([FILE + b"one", b"two"], closed=True)
    assert [await anext(file), await anext(file)] == [b"one", b"two"]
    with pytest.raises(RequestError, match="closed before all of the body came"):
        await anext(file)


@pytest.mark.parametrize(
    ("content_type", "body", "field", "complaint"),
    [
        (None, b"", "body", "must be a form, sent as multipart/form-data"),
        ("image/png", b"\x89PNG", "body", "must be a form, sent as multipart/form-data"),
        ("multipart/mixed; boundary=limit", FILE + b"a" + END, "body", "must be a form, sent as multipart/form-data"),
        ("multipart/form-data", FILE + b"a" + END, "body", "without the boundary"),
        ('multipart/form-data; boundary=""', FILE + b"a" + END, "body", "without the boundary"),
        ("multipart/form-data; boundary=" + "x" * 300, b"", "body", "has a boundary that is too long"),
        ("multipart/form-data; boundary=\u00e9", FILE + b"a" + END, "body", "is not valid multipart/form-data"),
        (FORM, b"nonsense", "body", "is not valid multipart/form-data"),
        (FORM, b"--limit\r\nContent Disposition: x\r\n\r\n", "body", "is not valid multipart/form-data"),
        (FORM, b"--limit\r\nA: " + b"a" * 5000, "body", "is not valid multipart/form-data"),
        (FORM, b"--limit\r\n" + b"A: b\r\n" * 20, "body", "is not valid multipart/form-data"),
        (FORM, NOTE * (MAX_PARTS + 1), "body", f"has more than {MAX_PARTS} fields"),
        (FORM, b"", "body", "ends before its last boundary"),
        (FORM, FILE + b"a", "body", "ends before its last boundary"),
        (FORM, FILE + b"a\r\n--limit\r\n", "body", "ends before its last boundary"),
        (FORM, b"--limit--\r\n", "file", "is required"),
        (FORM, NOTE + OTHER_FILE + NAMELESS + b"x" + END, "file", "is required"),
        (FORM, TEXT + b"a" + END, "file", "must be sent as a file, with a filename"),
        (FORM, FILE + b"a\r\n" + FILE + b"b" + END, "file", "was sent more than once"),
    ],
)
async def test_a_form_without_exactly_one_such_file_is_refused(
    content_type: str | None, body: bytes, field: str, complaint: str
) -> None:
    with pytest.raises(ValidationError) as refused:
        [piece async for piece in _file([body], content_type)]
    assert list(refused.value.details) == [field]
    assert complaint in refused.value.details[field][0]
