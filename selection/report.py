"""Every report of the project: one self-contained page from titled sections of text, tables and figures.

`render_html` gives a page that loads nothing from elsewhere, reads on a phone and on a desk, in light and in dark.
`render_markdown` gives the same for a repository or a terminal.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from pathlib import Path
from typing import TypedDict

from matplotlib.figure import Figure


class Section(TypedDict, total=False):
    """One part of a page; every key but `title` may be left out.

    Keys:
        title: heading.
        text: a paragraph, or several.
        table: rows of cells, the heading row first.
        figures: drawn at their own width, never wider than the page.
        note: small print under the rest, where what was not measured belongs.
    """

    title: str
    text: str | list[str]
    table: list[list[str]]
    figures: list[Figure]
    note: str


# A column with a longer cell than this is prose and may wrap; others hold numbers and names, which stay whole.
PROSE = 48

STYLE = """
:root { color-scheme: light dark; --ink: #1f2328; --paper: #ffffff; --line: #d4d9df; --soft: #f4f6f8;
  --quiet: #5a6470; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e7eb; --paper: #16191d; --line: #3a424b; --soft: #20252b; --quiet: #9ca6b1; }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0 auto; max-width: 56rem; padding: 1rem clamp(0.9rem, 4vw, 2rem) 3rem; color: var(--ink);
  background: var(--paper); font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", sans-serif;
  overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: 0.5rem 0 1rem; }
h2 { font-size: 1.15rem; line-height: 1.3; margin: 2.25rem 0 0.6rem; padding-bottom: 0.3rem;
  border-bottom: 1px solid var(--line); }
p { margin: 0.6rem 0; max-width: 44rem; }
nav { font-size: 0.9rem; } nav a { color: inherit; margin-right: 0.9rem; white-space: nowrap; display: inline-block; }
.note { color: var(--quiet); font-size: 0.88rem; }
figure { margin: 0.9rem 0; }
img { max-width: 100%; height: auto; display: block; background: #ffffff; border: 1px solid var(--line);
  border-radius: 4px; }
.scroll { overflow-x: auto; margin: 0.75rem 0; }
table { border-collapse: collapse; font-size: 0.92rem; font-variant-numeric: tabular-nums; }
th, td { padding: 0.35rem 0.7rem; border-bottom: 1px solid var(--line); text-align: right; vertical-align: top;
  white-space: nowrap; }
th { background: var(--soft); }
th:first-child, td:first-child { text-align: left; padding-left: 0.4rem; }
th.prose, td.prose { white-space: normal; text-align: left; min-width: 16rem; }
@media (max-width: 40rem) {
  th, td { padding: 0.3rem 0.4rem; overflow-wrap: break-word; }
  th, th:first-child, td:first-child { white-space: normal; }
}
"""


def render_html(title: str, sections: Sequence[Section]) -> str:
    """The page as text, figures embedded as PNG.

    Raises ValueError for a section without a title, or a table whose rows differ in length.
    """
    parts = [_html_section(number, section) for number, section in enumerate(sections, start=1)]
    links = "".join(f'<a href="#s{number}">{html.escape(_title(s))}</a>' for number, s in enumerate(sections, start=1))
    contents = f"<nav>{links}</nav>\n" if len(sections) > 3 else ""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{STYLE}</style></head>\n"
        f"<body><main><h1>{html.escape(title)}</h1>\n{contents}" + "\n".join(parts) + "\n</main></body></html>\n"
    )


def render_markdown(title: str, sections: Sequence[Section], figures: Path | None = None) -> str:
    """The same as Markdown.

    Args:
        figures: folder that gets the figures as PNG, linked by its name (put the text beside it); None leaves them out.
    """
    parts = [f"# {title}"]
    for number, section in enumerate(sections, start=1):
        parts.append(f"## {_title(section)}")
        parts += _paragraphs(section)
        if section.get("table"):
            rows = [[_cell(cell) for cell in row] for row in _rows(section)]
            lines = [rows[0], ["---"] + ["---:"] * (len(rows[0]) - 1), *rows[1:]]
            parts.append("\n".join("| " + " | ".join(row) + " |" for row in lines))
        if figures is not None:
            for place, figure in enumerate(section.get("figures", []), start=1):
                figures.mkdir(parents=True, exist_ok=True)
                name = f"{number}-{place}.png"
                figure.savefig(figures / name, format="png")
                parts.append(f"![{_words(figure, _title(section))}]({figures.name}/{name})")
        if section.get("note"):
            parts.append(f"*{section['note']}*")
    return "\n\n".join(parts) + "\n"


def _title(section: Section) -> str:
    if not section.get("title"):
        raise ValueError(f"a report section needs a title; this one has only {', '.join(section) or 'nothing'}")
    return section["title"]


def _paragraphs(section: Section) -> list[str]:
    text = section.get("text", [])
    return [text] if isinstance(text, str) else list(text)


def _rows(section: Section) -> list[list[str]]:
    rows = section["table"]
    widths = {len(row) for row in rows}
    if len(widths) > 1:
        raise ValueError(f"report table {_title(section)!r} has rows of {', '.join(map(str, sorted(widths)))} cells")
    return rows


def _html_section(number: int, section: Section) -> str:
    title = _title(section)
    parts = [f"<h2>{html.escape(title)}</h2>"]
    parts += [f"<p>{html.escape(paragraph)}</p>" for paragraph in _paragraphs(section)]
    if section.get("table"):
        parts.append(_html_table(_rows(section)))
    parts += [_html_figure(figure, title) for figure in section.get("figures", [])]
    if section.get("note"):
        parts.append(f'<p class="note">{html.escape(section["note"])}</p>')
    return f'<section id="s{number}">' + "\n".join(parts) + "</section>"


def _html_table(rows: list[list[str]]) -> str:
    prose = [any(len(row[column]) > PROSE for row in rows[1:]) for column in range(len(rows[0]))]
    mark = [' class="prose"' if wraps else "" for wraps in prose]
    head = "".join(f'<th scope="col"{m}>{html.escape(cell)}</th>' for m, cell in zip(mark, rows[0], strict=True))
    lines = []
    for row in rows[1:]:
        cells = [f"<td{m}>{html.escape(cell)}</td>" for m, cell in zip(mark, row, strict=True)]
        lines.append("<tr>" + "".join(cells) + "</tr>")
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"
    return f'<div class="scroll" tabindex="0">{table}</div>'


def _html_figure(figure: Figure, fallback: str) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    data = base64.b64encode(buffer.getvalue()).decode()
    # A CSS pixel is 1/96 inch; more pixels than that are for dense screens.
    width = round(figure.get_figwidth() * 96)
    words = html.escape(_words(figure, fallback))
    return f'<figure><img alt="{words}" width="{width}" src="data:image/png;base64,{data}"></figure>'


def _words(figure: Figure, fallback: str) -> str:
    """For those who cannot see the figure, from its title and axes."""
    axes = figure.axes[0] if figure.axes else None
    if axes is None:
        return fallback
    named = axes.get_title() or fallback
    return f"{named}: {axes.get_ylabel()} against {axes.get_xlabel()}" if axes.get_xlabel() else named


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
