"""HTML pages that need nothing outside of themselves. Needs no torch."""

from __future__ import annotations

import html
from collections.abc import Sequence


def page(title: str, parts: Sequence[str]) -> str:
    """A whole page from pieces of HTML, readable on a desktop and on a phone; it asks for no other file."""
    # the title stands before the body, and what no page can hold, such as half a character of a file's name, is a "?"
    whole = _PAGE.replace("BODY", "\n".join(parts), 1).replace("TITLE", html.escape(title), 1)
    return whole.encode("utf-8", "replace").decode("utf-8")


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of plain texts, which scrolls sideways where the screen is narrow."""

    def line(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    body = "\n".join(line(row, "td") for row in rows)
    return f'<div class="wide"><table>{line(head, "th")}\n{body}</table></div>'


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>TITLE</title><link rel="icon" href="data:,">
<style>
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 0 auto; padding: 1rem; color: #222; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: 13px; }
td, th { border-bottom: 1px solid #ddd; padding: .2rem .7rem .2rem 0; text-align: left; }
section { border-left: 3px solid #ddd; padding-left: 1rem; margin: 1rem 0; }
h3 { margin: 1.2rem 0 .2rem; font-size: 1rem; } section h3 { margin: 0; }
img { width: 128px; image-rendering: pixelated; } svg, audio { max-width: 100%; height: auto; }
audio { height: 2.5rem; } .right b { color: #176f2c; } .other b { color: #9a3412; }
pre { overflow-x: auto; font-size: 13px; } h1, h2, code { overflow-wrap: anywhere; } .problem { color: #9a3412; }
</style></head><body>
BODY
</body></html>
"""
