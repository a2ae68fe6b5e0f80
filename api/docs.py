"""GET /docs: the API described for people, by Swagger UI.

FastAPI's own page loads whatever its CDN gives out as the newest version, and people type their API keys into it. This
one names the very files, by their digests, and its policy lets nothing else run.
"""

import base64
import hashlib

from fastapi import APIRouter
from starlette.responses import HTMLResponse

from api.errors import documented

router = APIRouter()

_PACKAGE = "https://cdn.jsdelivr.net/npm/swagger-ui-dist@5.35.0"
_SCRIPT_DIGEST = "sha384-gjRm0bEPMeTmMh5jT2cHccIwCUZSTd8YC+j0d0sXw0MdGEfScduGpSyF3ZSSLkX9"
_STYLE_DIGEST = "sha384-WlYgdmXYOOBWL5apwjDEZwN+U3HmXSSu5R6V5aGxEcf7z+KuRNwBhoxKVN1i3D5I"

_START = 'SwaggerUIBundle({url: "openapi.json", dom_id: "#ui", deepLinking: true});'

_PAGE = f"""<!DOCTYPE html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>upscaled</title>
<link rel="icon" href="data:,">
<link rel="stylesheet" href="{_PACKAGE}/swagger-ui.css" integrity="{_STYLE_DIGEST}" crossorigin="anonymous">
<div id="ui">The API is described at <a href="openapi.json">openapi.json</a>.</div>
<script src="{_PACKAGE}/swagger-ui-bundle.js" integrity="{_SCRIPT_DIGEST}" crossorigin="anonymous"></script>
<script>{_START}</script>
</html>
"""

_POLICY = "; ".join(
    [
        "default-src 'none'",
        f"script-src {_PACKAGE}/ 'sha256-{base64.b64encode(hashlib.sha256(_START.encode()).digest()).decode()}'",
        f"style-src {_PACKAGE}/ 'unsafe-inline'",
        "img-src data:",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    ]
)


@router.get("/docs", include_in_schema=False, response_class=HTMLResponse, responses=documented())
async def docs() -> HTMLResponse:
    """Return the page; all that it shows is in /openapi.json."""
    return HTMLResponse(_PAGE, headers={"Content-Security-Policy": _POLICY})
