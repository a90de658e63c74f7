"""The page: one HTML file without an outside resource, and the policy that tells the browser so."""

from __future__ import annotations

import base64
import hashlib
import re
from importlib import resources

_ELEMENTS = {"script-src": r"<script>(.*?)</script>", "style-src": r"<style>(.*?)</style>"}


def load_page() -> tuple[bytes, str]:
    """The page, and a Content-Security-Policy under which nothing runs but what stands in it."""
    html = resources.files("omni.server").joinpath("page.html").read_text(encoding="utf-8")
    policy = [
        "default-src 'none'",
        "connect-src 'self'",
        "img-src 'self' data: blob:",
        "media-src blob:",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    ]
    for directive, pattern in _ELEMENTS.items():
        hashes = [hashlib.sha256(text.encode()).digest() for text in re.findall(pattern, html, re.DOTALL)]
        allowed = (f"'sha256-{base64.b64encode(digest).decode()}'" for digest in hashes)
        policy.append(" ".join([directive, *allowed]))
    return html.encode(), "; ".join(policy)
