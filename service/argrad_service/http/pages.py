"""/docs: Swagger UI, under a policy that lets it load that one script and call this one service."""

from __future__ import annotations

import base64
import hashlib
import re

from fastapi.openapi.docs import get_swagger_ui_html
from starlette.responses import Response

_SCRIPTS = "https://cdn.jsdelivr.net/npm/swagger-ui-dist@5/swagger-ui-bundle.js"
_STYLES = "https://cdn.jsdelivr.net/npm/swagger-ui-dist@5/swagger-ui.css"
_INLINE = re.compile(rb"<script>(.*?)</script>", re.DOTALL)


def documentation(title: str) -> Response:
    """The page; its script is known to its policy by digest, so that no other one runs."""
    page = get_swagger_ui_html(
        openapi_url="/openapi.json",
        title=title,
        swagger_js_url=_SCRIPTS,
        swagger_css_url=_STYLES,
        swagger_favicon_url="data:,",
    )
    digests = [base64.b64encode(hashlib.sha256(text).digest()).decode() for text in _INLINE.findall(page.body)]
    scripts = " ".join([*(f"'sha256-{digest}'" for digest in digests), _SCRIPTS])
    page.headers["Content-Security-Policy"] = (
        f"default-src 'none'; script-src {scripts}; style-src 'unsafe-inline' {_STYLES}; img-src 'self' data:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return page
