"""Pages for people: each one document that needs nothing else, whoever serves it. Owns how they are put together from
the files of `server/web`, and what a browser lets them do.

A page holds no data and needs no key to be fetched: its script asks for a key where the server wants one, and sends it
as a header. The policy allows this script, this style, and calls to where the page came from; markup is never made of
text (trusted types).
"""

from __future__ import annotations

import base64
import hashlib
import html
from collections.abc import Mapping
from importlib import resources

import msgspec

HTML_TYPE = "text/html; charset=utf-8"
_FOLDER = "web"


class WebPage(msgspec.Struct, frozen=True):
    """A whole answer: `headers` beside the content type and the length."""

    body: bytes
    headers: Mapping[str, str]


def load_page(name: str, title: str) -> WebPage:
    """The page `name`: its markup, its style and its script, behind what all pages have."""
    style = _read("page.css")
    script = "\n".join(('"use strict";', _read("page.js"), _read(f"{name}.js")))
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark"><link rel="icon" href="data:,">'
        f"<title>{html.escape(title)}</title><style>{style}</style>"
    )
    text = f'<!doctype html>\n<html lang="en"><head>{head}</head><body>{_read(f"{name}.html")}'
    return WebPage(f"{text}<script>{script}</script></body></html>\n".encode(), _headers(style, script))


def _headers(style: str, script: str) -> dict[str, str]:
    policy = (
        "default-src 'none'",
        f"script-src {_hash(script)}",
        f"style-src {_hash(style)}",
        "img-src data:",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
    return {
        "content-security-policy": "; ".join(policy),
        "x-content-type-options": "nosniff",
        "x-frame-options": "DENY",
        "referrer-policy": "no-referrer",
        "cross-origin-opener-policy": "same-origin",
        "cross-origin-resource-policy": "same-origin",
        "cache-control": "no-cache",
    }


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _read(file: str) -> str:
    return (resources.files("headrace.server") / _FOLDER / file).read_text(encoding="utf-8")
