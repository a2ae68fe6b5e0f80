"""Request headers whose grammar is more than a word: Prefer (RFC 7240), If-None-Match (RFC 9110), two of submits.

And what a request's answer will carry in headers, whichever answer that will be.
"""

import re
from collections.abc import Mapping, Sequence
from datetime import timedelta

from fastapi import Request

from core.errors import ValidationError

MAX_WAIT_SECONDS = 60

REPLAYED = "Idempotent-Replayed"
"""An answer's header: `true` where an Idempotency-Key came again and nothing was made."""

_TOKEN = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"  # noqa: S105 - the grammar's own word
_QUOTED = r'"(?:[^"\\]|\\.)*+"'

# A quotation that is never closed takes the rest with it, so that no header costs more than its length.
_PREFERENCES = re.compile(r'(?:[^,"]|"(?:[^"\\]|\\.)*+(?:"|\\?$))+')
_PREFERENCE = re.compile(rf"[ \t]*({_TOKEN})[ \t]*(?:=[ \t]*({_TOKEN}|{_QUOTED}|))?[ \t]*(?:;.*)?", re.DOTALL)

_TAGS = re.compile(r'(?:W/)?("[\x21\x23-\x7e\x80-\xff]*")')


def preferred_wait(prefer: Sequence[str]) -> int | None:
    """Return how many seconds, 1 to 60, the Prefer headers ask us to hold an answer; None when they ask nothing such.

    `wait` alone means 60. Of several the first counts. What is malformed, out of range or unknown is passed over.
    """
    for element in _PREFERENCES.findall(",".join(prefer)):
        preference = _PREFERENCE.fullmatch(element)
        if preference is not None and preference[1].lower() == "wait":
            value = (preference[2] or "").strip('"')
            if not value:
                return MAX_WAIT_SECONDS
            seconds = int(value) if re.fullmatch("[0-9]{1,3}", value) else 0
            return seconds if 1 <= seconds <= MAX_WAIT_SECONDS else None
    return None


def names_tag(if_none_match: Sequence[str], tag: str) -> bool:
    """Tell whether If-None-Match headers name an ETag, weak or not, or name any by `*`."""
    value = ",".join(if_none_match)
    return value.strip() == "*" or tag.removeprefix("W/") in _TAGS.findall(value)


def read_idempotency_key(value: str | None) -> str | None:
    """Return the key, without the quotes that a structured header has; it is opaque but for its length and characters.

    Raises:
        ValidationError: it is empty, longer than 255 characters or not printable ASCII.
    """
    if value is None:
        return None
    key = value[1:-1] if len(value) >= 2 and value[0] == value[-1] == '"' else value
    if not re.fullmatch("[\x20-\x7e]{1,255}", key):
        raise ValidationError({"Idempotency-Key": ["must be 1 to 255 printable ASCII characters"]})
    return key


MAX_CANCEL_AFTER = timedelta(days=7)
_UNITS = {"": "seconds", "s": "seconds", "m": "minutes", "h": "hours"}


def read_cancel_after(value: str | None) -> timedelta | None:
    """Return how long the caller is interested: `90`, `90s`, `5m` or `1h30m`.

    Raises:
        ValidationError: it is none of that, or not between 1 second and 7 days.
    """
    if value is None:
        return None
    parts = re.findall("([0-9]{1,6})([smh]?)", value)
    whole = "".join(number + unit for number, unit in parts) == value
    if not parts or not whole or (len(parts) > 1 and not all(unit for _, unit in parts)):
        raise ValidationError({"Cancel-After": ["must be a time such as 90s, 5m or 1h30m"]})
    given = sum((timedelta(**{_UNITS[unit]: int(number)}) for number, unit in parts), timedelta())
    if not timedelta(seconds=1) <= given <= MAX_CANCEL_AFTER:
        raise ValidationError({"Cancel-After": ["must be between 1 second and 7 days"]})
    return given


def add_to_answer(request: Request, headers: Mapping[str, str]) -> None:
    """Let the request's answer carry these headers, error or not; what is said twice is joined as a list."""
    added: dict[str, str] = request.scope["state"].setdefault("answer_headers", {})
    for name, value in headers.items():
        added[name] = f"{added[name]}, {value}" if name in added else value
