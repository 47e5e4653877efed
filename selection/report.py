"""Every report of the project: one self-contained HTML page from titled sections of text, tables and figures."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from typing import TypedDict

from matplotlib.figure import Figure


class Section(TypedDict, total=False):
    """One part of a page.

    Keys:
        title: heading.
        text: a paragraph, plain text.
        table: rows of cells, the heading row first.
        figures: drawn at their own width, never wider than the page.
    """

    title: str
    text: str
    table: list[list[str]]
    figures: list[Figure]


STYLE = """
:root { color-scheme: light dark; --ink: #1d2329; --paper: #ffffff; --line: #d5dae0; --soft: #f3f5f7; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ec; --paper: #15191d; --line: #363d45; --soft: #1f252b; } }
body { margin: 0 auto; max-width: 60rem; padding: 1rem; color: var(--ink); background: var(--paper);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; border-bottom: 1px solid var(--line); }
img { max-width: 100%; height: auto; display: block; margin: 0.75rem 0; background: #ffffff; border-radius: 4px; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: 0.3rem 0.8rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; } th { background: var(--soft); }
"""


def render_html(title: str, sections: Sequence[Section]) -> str:
    """The page as text. Figures are embedded as PNG; nothing is loaded from elsewhere."""
    body = "\n".join(_section(section) for section in sections)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{STYLE}</style></head>\n"
        f"<body><h1>{html.escape(title)}</h1>\n{body}\n</body></html>\n"
    )


def _section(section: Section) -> str:
    parts = [f"<h2>{html.escape(section['title'])}</h2>"]
    if section.get("text"):
        parts.append(f"<p>{html.escape(section['text'])}</p>")
    if section.get("table"):
        parts.append(_table(section["table"]))
    parts += [_image(figure, section["title"]) for figure in section.get("figures", [])]
    return "<section>" + "\n".join(parts) + "</section>"


def _table(rows: list[list[str]]) -> str:
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in rows[0])
    lines = ["<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows[1:]]
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'


def _image(figure: Figure, fallback: str) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    axes = figure.axes[0] if figure.axes else None
    words = (axes.get_title() or axes.get_ylabel()) if axes is not None else ""
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="{html.escape(words or fallback)}" src="data:image/png;base64,{data}">'
