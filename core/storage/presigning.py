"""URLs that carry their own permission for one request to a bucket (AWS Signature Version 4 in the query)."""

import hmac
import re
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from urllib.parse import parse_qs

from botocore.auth import SIGV4_TIMESTAMP, S3SigV4QueryAuth
from botocore.awsrequest import AWSRequest
from botocore.credentials import ReadOnlyCredentials

MAX_SECONDS = 604_800
"""S3 refuses URLs that claim to live longer."""


class Presigner:
    """Signs URLs under `base_url`, which names the bucket and ends in a slash, for the host that it names."""

    def __init__(self, base_url: str, region: str) -> None:
        self._base_url = base_url
        self._region = region

    def sign(
        self,
        credentials: ReadOnlyCredentials,
        method: str,
        path: str,
        *,
        as_of: datetime,
        until: datetime,
        headers: Mapping[str, str] | None = None,
    ) -> str:
        """Return a URL that holds until `until`, or for MAX_SECONDS from `as_of` when that is sooner.

        Args:
            path: what follows the base, needing no percent-encoding.
            as_of: when it is signed; the same moment gives the same URL. Whole seconds count.
            headers: what the request then has to carry, exactly.
        """
        ends = int(until.timestamp())
        began = min(int(as_of.timestamp()), ends - 1)  # S3 knows of no URL that lives for no time
        expires = min(ends - began, MAX_SECONDS)
        request = AWSRequest(method=method, url=self._base_url + path, headers=headers)
        _DatedAuth(credentials, self._region, datetime.fromtimestamp(began, UTC), expires).add_auth(request)
        assert request.url is not None
        return request.url

    def path_of(self, url: str) -> str | None:
        """Return what follows the base in a URL that might be one of ours: nothing is checked but where it leads."""
        return url[len(self._base_url) :].partition("?")[0] if url.startswith(self._base_url) else None

    def verify(self, credentials: ReadOnlyCredentials, url: str, now: datetime) -> bool:
        """Tell whether these credentials signed this very URL for a GET, and whether it still holds."""
        path, query = self.path_of(url), parse_qs(url.partition("?")[2])
        date, seconds = query.get("X-Amz-Date", [""])[0], query.get("X-Amz-Expires", [""])[0]
        if path is None or not re.fullmatch("[1-9][0-9]{0,5}", seconds):
            return False
        try:
            as_of = datetime.strptime(date, SIGV4_TIMESTAMP).replace(tzinfo=UTC)
            until = as_of + timedelta(seconds=int(seconds))
        except (ValueError, OverflowError):
            return False
        ours = self.sign(credentials, "GET", path, as_of=as_of, until=until)
        return hmac.compare_digest(ours.encode(), url.encode(errors="replace")) and now < until


class _DatedAuth(S3SigV4QueryAuth):
    """Signs as of a given moment; botocore's own knows only now."""

    def __init__(self, credentials: ReadOnlyCredentials, region: str, as_of: datetime, expires: int) -> None:
        super().__init__(credentials, "s3", region, expires)
        self._timestamp = as_of.strftime(SIGV4_TIMESTAMP)

    def _modify_request_before_signing(self, request: AWSRequest) -> None:
        request.context["timestamp"] = self._timestamp  # every later step of the signing reads it from there
        super()._modify_request_before_signing(request)  # pyright: ignore[reportUnknownMemberType, reportAttributeAccessIssue]
