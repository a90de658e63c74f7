"""HTML pages that need nothing outside of themselves. Needs no torch."""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable, Sequence
from pathlib import Path

from omni.sample import Sample

_KINDS = {".jpg": "image/jpeg", ".png": "image/png", ".ogg": "audio/ogg"}
_LARGEST_FILE = 400_000  # bytes of one embedded file; a larger one is named instead


def page(title: str, parts: Sequence[str]) -> str:
    """A whole page from pieces of HTML, readable on a desktop and on a phone; it asks for no other file."""
    # the title stands before the body, and what no page can hold, such as half a character of a file's name, is a "?"
    whole = _PAGE.replace("BODY", "\n".join(parts), 1).replace("TITLE", html.escape(title), 1)
    return whole.encode("utf-8", "replace").decode("utf-8")


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of plain texts, which scrolls sideways where the screen is narrow."""

    def line(cells: Sequence[str], tag: str) -> str:
        # long names may break at their underscores
        shown = (html.escape(cell).replace("_", "_<wbr>") for cell in cells)
        return "<tr>" + "".join(f"<{tag}>{cell}</{tag}>" for cell in shown) + "</tr>"

    body = "\n".join(line(row, "td") for row in rows)
    return f'<div class="wide"><table>{line(head, "th")}\n{body}</table></div>'


def plain_section(title: str, text: str) -> str:
    """A heading and a text that is shown as it is."""
    return f"<h2>{html.escape(title)}</h2><pre>{html.escape(text)}</pre>"


def sample_sections(samples: Iterable[Sample]) -> str:
    """Samples with their pictures and sounds inside of the page."""
    return "\n".join(map(_section, samples))


def _section(sample: Sample) -> str:
    mark = {True: "right", False: "other", None: ""}[sample.right]
    parts = [f"<h3>{html.escape(sample.title)}</h3>"]
    if sample.texts:
        rows = (f"<dt>{html.escape(label)}</dt><dd>{html.escape(text)}</dd>" for label, text in sample.texts)
        parts.append(f'<dl class="{mark}">{"".join(rows)}</dl>')
    if sample.pieces:
        pieces = (f'<span class="{html.escape(kind)}">{html.escape(text)}</span>' for kind, text in sample.pieces)
        parts.append(f'<p class="pieces">{"".join(pieces)}</p>')
    parts += [_picture(label, path) for label, path in sample.pictures]
    parts += [_sound(label, path) for label, path in sample.sounds]
    return f"<section>{''.join(parts)}</section>"


def _picture(label: str, path: Path) -> str:
    name, source = html.escape(label), _embedded(path)
    shown = f'<img alt="{name}" src="{source}">' if source else f"<p>{html.escape(str(path))}</p>"
    return f"<figure>{shown}<figcaption>{name}</figcaption></figure>"


def _sound(label: str, path: Path) -> str:
    name, source = html.escape(label), _embedded(path)
    shown = f'<audio controls src="{source}"></audio>' if source else html.escape(str(path))
    return f'<p class="sound"><span>{name}</span>{shown}</p>'


def _embedded(path: Path) -> str | None:
    """A file as a data address; None where it is missing or too large."""
    if not path.is_file() or path.stat().st_size > _LARGEST_FILE:
        return None
    return f"data:{_KINDS[path.suffix]};base64,{base64.b64encode(path.read_bytes()).decode()}"


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>TITLE</title><link rel="icon" href="data:,">
<style>
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 0 auto; padding: 1rem; color: #222; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: 13px; }
td, th { border-bottom: 1px solid #ddd; padding: .2rem .7rem .2rem 0; text-align: left; }
section { border-left: 3px solid #ddd; padding-left: 1rem; margin: 1rem 0; }
h3 { margin: 1.2rem 0 .2rem; font-size: 1rem; } section h3 { margin: 0; }
img, svg { max-width: 100%; height: auto; } figure { margin: .5rem 0; } figcaption { color: #666; font-size: 13px; }
.sound { display: flex; flex-wrap: wrap; align-items: center; gap: .2rem .7rem; margin: .3rem 0; }
.sound span { min-width: 6rem; } audio { height: 2.5rem; width: 20rem; max-width: 100%; }
dl { margin: .3rem 0; } dt { color: #666; font-size: 13px; } dd { margin: 0 0 .3rem; overflow-wrap: anywhere; }
dd { white-space: pre-wrap; } .right dd:last-of-type { color: #176f2c; } .other dd:last-of-type { color: #9a3412; }
.pieces { line-height: 2; overflow-wrap: anywhere; }
.pieces span { border-radius: 3px; padding: .1rem .2rem; margin: 1px; }
.text { background: #eef1f6; } .mark { color: #888; font-size: 12px; } .answer { background: #e8dcf7; }
.image { background: #d9efdd; } .audio { background: #fbe5c8; } .words { background: #f8efbd; }
nav a { margin-right: 1rem; } @media (max-width: 500px) { section { padding-left: .6rem; } }
pre { overflow-x: auto; font-size: 13px; } h1, h2, code { overflow-wrap: anywhere; } .problem { color: #9a3412; }
</style></head><body>
BODY
</body></html>
"""
