"""The file in a multipart form, as it arrives."""

from collections.abc import AsyncGenerator
from contextlib import aclosing

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import ClientDisconnect, Request

from core.errors import RequestError, ValidationError

MAX_PARTS = 100
"""How many fields a form may have: each costs more than its bytes do."""


async def read_file(request: Request, field: str) -> AsyncGenerator[bytes]:
    """Yield what the form's only file of that name holds, piece by piece, while the body comes in.

    Nothing is kept, so whoever takes the pieces slowly slows the sender down. Other fields are passed over. What is
    wrong with the form may show only after the last piece.

    Raises:
        ValidationError: the body is no such form, or has not exactly one file of that name.
        RequestError: the connection was closed in the middle.
    """
    form = _Form(_boundary(request.headers.get("content-type")), field)
    try:
        async with aclosing(request.stream()) as body:
            async for chunk in body:
                for piece in form.feed(chunk):
                    yield piece
    except ClientDisconnect as error:
        raise RequestError("The connection was closed before all of the body came.") from error
    form.finish()


class _Form:
    """A form of which one file is of interest; the parser calls its methods in the order of the body."""

    def __init__(self, boundary: bytes, field: str) -> None:
        self._field = field
        self._pieces: list[bytes] = []
        self._parts = 0
        self._header, self._value, self._disposition = b"", b"", b""
        self._inside = self._found = self._ended = False
        try:
            self._parser = MultipartParser(
                boundary,
                {
                    "on_part_begin": self._begin_part,
                    "on_header_field": self._read_header,
                    "on_header_value": self._read_value,
                    "on_header_end": self._end_header,
                    "on_headers_finished": self._begin_data,
                    "on_part_data": self._read_data,
                    "on_part_end": self._end_part,
                    "on_end": self._end,
                },
            )
        except FormParserError as error:
            raise _wrong("has a boundary that is too long") from error

    def feed(self, chunk: bytes) -> list[bytes]:
        """Return what of the file this part of the body holds."""
        self._pieces = []
        try:
            self._parser.write(chunk)
        except FormParserError as error:
            raise _wrong("is not valid multipart/form-data") from error
        return self._pieces

    def finish(self) -> None:
        """Check that nothing is missing, now that the body is over."""
        if not self._ended:
            raise _wrong("ends before its last boundary")
        if not self._found:
            raise ValidationError({self._field: ["is required"]})

    def _begin_part(self) -> None:
        self._disposition = b""
        self._parts += 1
        if self._parts > MAX_PARTS:
            raise _wrong(f"has more than {MAX_PARTS} fields")

    def _read_header(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]

    def _read_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _end_header(self) -> None:
        if self._header.lower() == b"content-disposition":
            self._disposition = self._value
        self._header, self._value = b"", b""

    def _begin_data(self) -> None:
        _, options = parse_options_header(self._disposition)
        if options.get(b"name") != self._field.encode():
            return
        if b"filename" not in options:
            raise ValidationError({self._field: ["must be sent as a file, with a filename"]})
        if self._found:
            raise ValidationError({self._field: ["was sent more than once"]})
        self._found = self._inside = True

    def _read_data(self, data: bytes, start: int, end: int) -> None:
        if self._inside:
            self._pieces.append(data[start:end])

    def _end_part(self) -> None:
        self._inside = False

    def _end(self) -> None:
        self._ended = True


def _boundary(content_type: str | None) -> bytes:
    kind, options = parse_options_header(content_type)
    if kind != b"multipart/form-data":
        raise _wrong("must be a form, sent as multipart/form-data")
    if not (boundary := options.get(b"boundary")):
        raise _wrong("is multipart/form-data without the boundary that Content-Type must name")
    return boundary


def _wrong(complaint: str) -> ValidationError:
    return ValidationError({"body": [complaint]})
