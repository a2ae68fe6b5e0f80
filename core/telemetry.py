"""Logs: one line per event on standard error, the same in every process, and fit to be shown around."""

import logging
import re
import time
from types import TracebackType

_FORMAT = "%(asctime)s.%(msecs)03dZ %(levelname)s %(name)s %(message)s"

REDACTED = "[redacted]"

_NAMES = (
    r"(?:proxy-)?authorization|(?:set-)?cookie|x-api-key|api[_-]?key|secret[_-]key|secret[_-]access[_-]key|password"
    r"|(?:x-amz-)?(?:signature|credential)|x-amz-security-token|(?:access[_-]|session[_-])?token|sig|awsaccesskeyid"
)
# Between a name and its value, in a header, a parameter of a URL, a field of JSON or what Python shows.
_BETWEEN = r"""(?:["']?\s*[:=,]\s*b?["']?|%3[Dd])(?:(?i:bearer|basic|token|digest)\s+)?"""

# Each alternative hides all of its match but what it caught in its group.
_SECRETS = re.compile(
    rf"""
    (?= [uwpacxstbgUWPACXSTBG] ) (?<! [A-Za-z0-9] )
        (?: (?P<key> upk_) \w{{9,}}                            # more of an API key than the part that is shown
          | (?P<hook> whsec_) [\w+/=-]+
          | (?P<name> (?i: {_NAMES}) {_BETWEEN}) [^\s"'&,;<>]+
          | (?P<bearer> (?i: bearer ) \s+ ) [\w.~+/-]{{8,}} =*
          | gAAAAA [\w-]{{40,}} ={{0,2}}                       # what Fernet sealed
          | (?: AKIA | ASIA ) [A-Z0-9]{{16}} \b                # an access key of AWS
        )
    | (?P<user> :// [^\s/:@"']* : ) [^\s/"']+ (?= @ )          # the password in a URL
    | (?<! [\w/+-] ) [\w-]{{43}} = (?! [\w=] )                # a key of Fernet
    | (?P<pem> -----BEGIN\ [A-Z0-9\ ]+----- ) .*? (?: -----END\ [A-Z0-9\ ]+----- | \Z )
    """,
    re.VERBOSE | re.DOTALL | re.ASCII,
)

_NEW_LINES = {ord("\n"): "\\n", ord("\r"): "\\r", 0x2028: "\\u2028", 0x2029: "\\u2029"}
_CONTROLS = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160))} | _NEW_LINES
"""Nothing that anybody sends us begins a new line, or steers a terminal."""

_WITHIN_TRACES = {code: shown for code, shown in _CONTROLS.items() if code != ord("\n")}


def redact(text: str) -> str:
    """Hide what a log must not hold: keys, signatures, tokens, passwords."""
    return _SECRETS.sub(_hide, text)


def _hide(match: re.Match[str]) -> str:
    return (match[match.lastgroup] if match.lastgroup else "") + REDACTED


class LineFormatter(logging.Formatter):
    """Writes an event as one line; a trace follows on lines that are indented. Secrets are hidden in both."""

    converter = time.gmtime

    def __init__(self) -> None:
        super().__init__(_FORMAT, "%Y-%m-%dT%H:%M:%S")

    def format(self, record: logging.LogRecord) -> str:
        return redact(super().format(record))

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's own name
        return super().formatMessage(record).translate(_CONTROLS)

    def formatException(  # noqa: N802 - logging's own name
        self,
        ei: tuple[type[BaseException], BaseException, TracebackType | None] | tuple[None, None, None],
    ) -> str:
        return _indent(super().formatException(ei))

    def formatStack(self, stack_info: str) -> str:  # noqa: N802 - logging's own name
        return _indent(super().formatStack(stack_info))


def _indent(trace: str) -> str:
    return "\n".join(f"    {line}" for line in trace.translate(_WITHIN_TRACES).split("\n"))


def configure_logging(level: str) -> None:
    """Send every logger's lines of at least `level` to standard error, stamped in UTC."""
    handler = logging.StreamHandler()
    handler.setFormatter(LineFormatter())
    logging.basicConfig(level=level, handlers=[handler], force=True)
