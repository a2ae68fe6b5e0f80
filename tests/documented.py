"""A client that holds every answer against the OpenAPI document."""

import re
from typing import Any

import httpx2 as httpx
import jsonschema
from fastapi import FastAPI
from starlette.testclient import TestClient

_documents: list[dict[str, Any]] = []


class DocumentedClient(TestClient):
    """A client that fails the test when an answer is not one that /openapi.json describes."""

    def __init__(self, app: FastAPI) -> None:
        super().__init__(app, raise_server_exceptions=False)
        self._document = _document_of(app)

    def request(self, method: str, url: Any, **arguments: Any) -> httpx.Response:
        response = super().request(method, url, **arguments)
        path = response.request.url.path
        if path.startswith("/v2") and response.status_code not in (404, 405):
            self._check("get" if method == "HEAD" else method.lower(), path, response)
        return response

    def _check(self, method: str, path: str, response: httpx.Response) -> None:
        template = next(template for template in self._document["paths"] if _matches(template, path))
        responses = self._document["paths"][template][method]["responses"]
        assert str(response.status_code) in responses, f"{response.status_code} is not documented for {method} {path}"
        schema = responses[str(response.status_code)].get("content", {}).get("application/json", {}).get("schema")
        if schema and response.headers["Content-Type"] == "application/json":
            whole = {**schema, "components": self._document["components"]}
            jsonschema.validate(response.json(), whole, jsonschema.Draft202012Validator)


def _document_of(app: FastAPI) -> dict[str, Any]:
    """Generate the document once in a run: it is the same for every app, as tests/integration/test_schema.py holds."""
    if not _documents:
        _documents.append(app.openapi())
    return _documents[0]


def _matches(template: str, path: str) -> bool:
    pattern = re.sub(r"\\{(\w+)(:path)?\\}", lambda match: ".+" if match[1] == "key" else "[^/]+", re.escape(template))
    return re.fullmatch(pattern, path) is not None
