"""A web page that is one file: text, tables and pictures, without anything from elsewhere.

Every function takes plain text, which it escapes, and returns HTML; what is called a body is HTML already.
"""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from muse.report.table import show

# What tells a page of this module from another one.
GENERATOR = '<meta name="generator" content="muse.report">'
STYLE = """
:root { color-scheme: light dark; --text: #1f2328; --quiet: #59636e; --ground: #ffffff; --line: #d1d9e0;
  --good: #1a7f37; --bad: #cf222e; }
@media (prefers-color-scheme: dark) { :root { --text: #e6edf3; --quiet: #9198a1; --ground: #0d1117;
  --line: #3d444d; --good: #3fb950; --bad: #f85149; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 76rem; background: var(--ground); color: var(--text);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.2rem; margin: 2rem 0 .5rem; }
h1, h2, summary, p { overflow-wrap: anywhere; }
p { margin: .5rem 0; } .quiet, figcaption { color: var(--quiet); font-size: .875rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .75rem .25rem 0; border-bottom: 1px solid var(--line); text-align: right;
  vertical-align: top; min-width: 4rem; }
th:first-child, td:first-child { text-align: left; min-width: 8rem; }
.pass { color: var(--good); } .fail { color: var(--bad); }
.pictures { display: grid; gap: 1rem; margin: 1rem 0;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); }
figure { margin: 0; break-inside: avoid; }
figure svg { width: 100%; height: auto; fill: currentColor; }
figure img { max-width: 100%; background: #ffffff; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; border-left: 3px solid var(--line);
  padding-left: 1rem; }
details { margin: .5rem 0; } summary { cursor: pointer; }
@media print { body { max-width: none; padding: 0; font-size: 12px; } tr { break-inside: avoid; } }
"""


def page(title: str, body: str) -> str:
    """The whole page."""
    return "\n".join(
        (
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            GENERATOR,
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>",
            f"<h1>{escape(title)}</h1>\n{body}\n</body>\n</html>\n",
        )
    )


def section(title: str, *bodies: str) -> str:
    """Bodies below a heading; empty where all of them are."""
    filled = [body for body in bodies if body]
    return "\n".join([f"<h2>{escape(title)}</h2>", *filled]) if filled else ""


def folded(title: str, body: str) -> str:
    """A body that is shown when its title is chosen; empty where it is."""
    return f"<details><summary>{escape(title)}</summary>\n{body}\n</details>" if body else ""


def paragraph(text: str, kind: str = "") -> str:
    """A paragraph; ``quiet`` is a kind of it."""
    return f"<p{_class(kind)}>{escape(text)}</p>"


def quoted(text: str) -> str:
    """Text with the lines that it has."""
    return f"<pre>{escape(text)}</pre>"


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Rows of values below a header, as on the terminal; empty where there are none."""
    if not rows:
        return ""
    head = "".join(f"<th>{escape(name)}</th>" for name in header)
    lines = ["".join(_cell(value) for value in row) for row in rows]
    body = "\n".join(f"<tr>{line}</tr>" for line in lines)
    return (
        f'<div class="wide"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>'
    )


def _cell(value: object) -> str:
    kind = {"pass": "pass", "fail": "fail"}.get(value, "") if isinstance(value, str) else ""
    return f"<td{_class(kind)}>{escape(show(value))}</td>"


def _class(kind: str) -> str:
    return f' class="{kind}"' if kind else ""


def pictures(bodies: Mapping[str, str]) -> str:
    """Pictures by their captions, beside each other where there is room; empty where there are none."""
    figures = [
        f"<figure><figcaption>{escape(name)}</figcaption>{body}</figure>" for name, body in bodies.items()
    ]
    return '<div class="pictures">\n' + "\n".join(figures) + "\n</div>" if figures else ""


def png(path: Path) -> str:
    """A PNG file as a picture.

    Raises:
        OSError: it cannot be read.
    """
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<img alt="{escape(path.stem)}" src="data:image/png;base64,{data}">'


def svg(figure: Any, width: float | None = None) -> str:
    """A figure of matplotlib, so many inches wide, as a picture in the colours of the text and the page."""
    from matplotlib import rc_context

    if width is not None:
        figure.set_figwidth(width)
    for patch in (figure.patch, *(axes.patch for axes in figure.axes)):
        patch.set_visible(False)
    file = io.StringIO()
    with rc_context({"svg.fonttype": "none"}):
        figure.canvas.print_figure(file, format="svg", metadata={"Date": None})
    text = file.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    # Names that nothing refers to would be there twice in a page of several pictures.
    used = set(re.findall(r"#([\w-]+)", text))
    text = re.sub(r' id="([^"]*)"', lambda found: found[0] if found[1] in used else "", text)
    text = re.sub(r"(?<=: )#000000\b", "currentColor", text)
    return re.sub(r"(?<=: )#ffffff\b", "var(--ground)", text)
