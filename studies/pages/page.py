"""What the HTML pages share: they open offline, on a phone as on a desktop, and fetch nothing from a network.

`template.html` has the style and the script that draws; a Page is filled from top to bottom. plotly.js lies beside the
pages, once a folder, or in a page that is written standalone.

    page = Page("Title")
    page.header("Windtunnel", "On what", [("good", "It works")])
    page.cards([("Speed", "3 tokens/s", "")])
    page.add_panels("Figures", [Panel("Sine", "A caption.", figure)])
    page.write(Path("page.html"))
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any, Literal

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs, get_plotlyjs_version

from engine.results.files import write_whole
from studies.pages.figures import Panel, style_of
from studies.words import number

TEMPLATE = Path(__file__).with_name("template.html")
LIBRARY = f"plotly-{get_plotlyjs_version()}.min.js"  # beside the pages that use it
_BESIDE = '<script src="{}"></script>'

Tone = Literal["good", "bad", "unsure", "plain"]
Cell = str | tuple[Tone | Literal["best"], str]  # of a table; with a tone it is coloured, the best of its row marked


class Page:
    """A page that is filled from top to bottom; `ending` is what stands beside our name at its end."""

    def __init__(self, title: str, ending: str = "") -> None:
        self.title, self.ending = title, ending
        self._body: list[str] = []
        self._figures: dict[str, go.Figure] = {}
        self._panels = 0

    def add(self, *blocks: str) -> None:
        """Add HTML."""
        self._body += filter(None, blocks)

    def header(
        self, kicker: str, setting: str, verdicts: Iterable[tuple[Tone, str]] = (),
        sources: Iterable[tuple[Tone, str, str]] = (), *, title: str = "", answer: str = "",
    ) -> None:  # fmt: skip
        """Add the top; a source is a tone, a word and a sentence about where the numbers come from.

        The answer, where a page has one, comes before everything else; the heading is the page's title by default.
        """
        chips = "".join(f"<li class='{tone}'>{text(words)}</li>" for tone, words in verdicts)
        lines = "\n".join(
            f"<p class='source'><b class='{tone}'>{escape(word)}</b> {text(words)}</p>" for tone, word, words in sources
        )
        self.add(f"""<header>
<p class='kicker'>{escape(kicker)}</p>
<h1>{escape(title or self.title)}</h1>
{f"<p class='answer'>{text(answer)}</p>" if answer else ""}
<p class='setting'>{escape(setting)}</p>
<ul class='verdicts'>{chips}</ul>
{lines}
</header>""")

    def cards(self, entries: Iterable[tuple[str, str, str]]) -> None:
        """Add numbers to see first: a name, the number and its unit after a space, and a note."""
        split = ((name, *value.partition(" ")[::2], note) for name, value, note in entries)
        found = (
            f"<div class='card'><dt>{escape(name)}</dt><dd>{escape(number)} <span>{escape(unit)}</span></dd>"
            f"<p>{text(note)}</p></div>"
            for name, number, unit, note in split
        )
        self.add(f"<dl class='cards'>{''.join(found)}</dl>")

    def add_panels(self, heading: str, panels: Sequence[Panel], words: str = "", html: str = "") -> None:
        """Add a section: a heading, words and HTML about it, and panels."""
        self.add(f"<h2>{escape(heading)}</h2>{about(words) if words else ''}{html}")
        if panels:
            self.add("<div class='panels'>", *map(self._panel, panels), "</div>")

    def html(self, standalone: bool = True) -> str:
        """Return the whole page; unless it is standalone, it has to lie beside LIBRARY."""
        # "<" could end the script element early, and in JSON may be written otherwise
        data = ",".join(f"{json.dumps(name)}:{figure.to_json()}" for name, figure in self._figures.items())
        return Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
            title=escape(f"{self.title} · Windtunnel"),
            body="\n".join([*self._body, f"<footer>Windtunnel{text(self.ending)}</footer>"]),
            figures="{" + data.replace("<", "\\u003c") + "}",
            plotly=f"<script>{get_plotlyjs()}</script>" if standalone else _BESIDE.format(LIBRARY),
        )

    def write(self, path: Path, standalone: bool = False) -> Path:
        """Write the page to `path`, whole or not at all, and return it; the plot library goes beside it or into it."""
        path.parent.mkdir(parents=True, exist_ok=True)
        if not standalone and not (path.parent / LIBRARY).is_file():
            write_whole(path.parent / LIBRARY, get_plotlyjs())
        write_whole(path, self.html(standalone))
        return path

    def _panel(self, panel: Panel) -> str:
        name = f"figure-{self._panels}"
        self._panels += 1
        words = f"<h3>{escape(panel.title)}</h3><p>{text(panel.caption)}</p>"
        figure = ""
        if panel.figure is not None:
            self._figures[name] = panel.figure
            label = f"role='img' aria-label='{escape(panel.title)}'"
            figure = (
                f"<div class='figure' id='{name}' {label} style='height:{panel.height_px}px'></div>"
                f"<button type='button' class='csv' data-figure='{name}'>Data as CSV</button>"
            )
        return f"<section class='panel {panel.width}'>{words}{figure}{panel.table}</section>"


def library_beside(html: str) -> str | None:
    """Return the name of the plot library that a page needs beside it; None for a standalone page."""
    found = re.search(_BESIDE.format(r"(plotly-[\d.]+\.min\.js)"), html)
    return found[1] if found else None


def with_library(html: str, library: Path) -> str:
    """Return a page made standalone."""
    return html.replace(_BESIDE.format(library.name), f"<script>{library.read_text(encoding='utf-8')}</script>")


def key(entries: Iterable[tuple[str, str]]) -> str:
    """Return what is laid side by side, in the colours of its lines: a name, and what there is to say about it."""
    lines = (
        f"<li style='border-color:{style_of(i)[0]}'>{escape(name)}<br><span>{text(words)}</span></li>"
        for i, (name, words) in enumerate(entries)
    )
    return f"<ul class='key'>{''.join(lines)}</ul>"


def numbers_table(
    heads: Sequence[str], rows: Iterable[tuple[str, Sequence[Cell]]], words: bool = False, sortable: bool = True
) -> str:
    """Return a table of numbers: the first of `heads` is above the rows' names, the others above their cells.

    A click on a head sorts the rows by its column, where these are `sortable`. With `words` the cells may be long, and
    wrap.
    """
    button = "<button type='button' class='sort'>{}</button>" if sortable else "{}"
    head = "".join(f"<th scope='col'>{button.format(escape(name)) if name else ''}</th>" for name in heads)
    body = "".join(f"<tr><th scope='row'>{escape(name)}</th>{''.join(map(_cell, cells))}</tr>" for name, cells in rows)
    kind = "numbers words" if words else "numbers"
    return (
        f"<div class='scroll'><table class='{kind}'><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _cell(cell: Cell) -> str:
    return f"<td>{text(cell)}</td>" if isinstance(cell, str) else f"<td class='{cell[0]}'>{text(cell[1])}</td>"


def coloured(words: str, met: bool | None) -> Cell:
    """Return a cell that shows whether a target is met; None: there is none."""
    return words if met is None else ("good" if met else "bad", words)


def facts_table(rows: Iterable[tuple[str, str]], code: bool = False) -> str:
    """Return a table of names, which may be shown as code, and what there is to say about each."""
    opened, closed = ("<code>", "</code>") if code else ("", "")
    body = "".join(f"<tr><th scope='row'>{opened}{escape(k)}{closed}</th><td>{text(v)}</td></tr>" for k, v in rows)
    return f"<div class='scroll'><table><tbody>{body}</tbody></table></div>"


def about(words: str) -> str:
    """Return a paragraph below a heading."""
    return f"<p class='source' style='margin:0 0 10px'>{text(words)}</p>"


def details(summary: str, html: str) -> str:
    """Return HTML that is shown when its summary is opened."""
    return f"<details><summary>{escape(summary)}</summary>{html}</details>"


def ranges(summary: Mapping[str, Any]) -> str:
    """Return a table of the ranges of results under drawn errors of the predicted times; "" for a run without any."""
    drawn = summary.get("uncertainty")
    if not drawn:
        return ""
    names = {"max_qps_under_slo": "capacity", "qps_per_gpu": "capacity per GPU"}
    rows = []
    for name, each in summary["intervals"].items():
        unit, scale = ("s", 1e-3) if name.endswith("_ms") else ("1/s", 1.0)
        words = f"{names.get(name, name.removesuffix('_ms').replace('_', ' '))} ({unit})"
        rows.append((words, [number(scale * each[end]) for end in ("low", "mid", "high")]))
    off = "; ".join(
        ", ".join(f"{name.replace('_', ' ')} {number(100 * share)} %" for name, share in errors.items())
        for errors in drawn["errors"]
    )
    return details(
        f"Ranges of {drawn['draws']:,} reruns with drawn errors of the predicted times: meant to hold "
        f"{number(100 * drawn['covers'])} % of such deployments",
        numbers_table(["", "low", "middle", "high"], rows) + f"<p>Errors drawn (90 % within): {escape(off)}.</p>",
    )


def text(words: str) -> str:
    """Escaped, and with each number on the line of its unit."""
    return escape(re.sub(r"(\d) (%|s|ms|µs)(?!\w)", "\\1\u00a0\\2", words))
