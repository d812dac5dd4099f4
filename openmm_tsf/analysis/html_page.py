"""Parts of a self-contained HTML page: escaped text, numbers, tables, pictures, and the layout.

The page loads nothing, runs no script, and says so to the browser by its Content-Security-Policy.
Tables become lists on narrow screens: each cell repeats the title of its column.
"""

import base64
import html
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from string import Template
from typing import Any, TypeGuard
from urllib.parse import quote

from openmm_tsf.analysis.statistics import SMALLEST_POPULATION
from openmm_tsf.utils.terminal import printable

UNKNOWN = "unknown"
#: Numbers from here on are written with an exponent.
_LARGEST = 1e12


def escape(value: Any) -> str:
    """Return a value as text of a page: no markup, no control characters."""
    return html.escape(printable(str(value)))


def is_number(value: Any) -> TypeGuard[float]:
    """Return whether a value is a finite number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def decimals_of(number: Any) -> int:
    """Return how many decimals show two digits of a positive number, such as an error."""
    if not is_number(number) or number <= 0:
        return 4
    return min(max(0, 1 - math.floor(math.log10(number))), 12)


def format_number(value: Any, decimals: int, sign: str = "") -> str:
    """Return a number as text, or "unknown" for None, NaN and infinity."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return UNKNOWN
    if not is_number(value):
        return escape(value)
    if abs(value) >= _LARGEST:
        return f"{value:{sign}.3g}".replace("-", "\N{MINUS SIGN}")
    return f"{value:{sign},.{decimals}f}".replace("-", "\N{MINUS SIGN}")


def format_small(value: Any) -> str:
    """Return a positive number, such as a bound, to two digits."""
    return format_number(value, decimals_of(value))


def format_with_error(value: Any, stderr: Any) -> str:
    """Return a value and its standard error, to two digits of the error.

    Examples
    --------
    >>> from openmm_tsf.analysis.html_page import format_with_error
    >>> format_with_error(0.020281, 0.001221), format_with_error(13.2, None)
    ('0.0203 ± 0.0012', '13.2000 ± unknown')
    """
    decimals = decimals_of(stderr)
    return f"{format_number(value, decimals)} ± {format_number(stderr, decimals)}"


def format_interval(low: Any, high: Any) -> str:
    """Return an interval to two digits, as a bound where it starts at 0 or is open, "" if unknown.

    Examples
    --------
    >>> from openmm_tsf.analysis.html_page import format_interval
    >>> format_interval(0.0067, 0.0391), format_interval(0.0, 0.0031), format_interval(2.25, None)
    ('0.0067 to 0.0391', 'at most 0.0031', 'at least 2.2')
    """
    if not is_number(high):
        return f"at least {format_small(low)}" if is_number(low) else ""
    if not is_number(low) or 0 <= low < SMALLEST_POPULATION:
        return f"at most {format_small(high)}"
    decimals = decimals_of((high - low) / 4)
    return f"{format_number(low, decimals)} to {format_number(high, decimals)}"


def format_duration(seconds: Any) -> str:
    """Return a time in seconds, minutes or hours.

    Examples
    --------
    >>> from openmm_tsf.analysis.html_page import format_duration
    >>> format_duration(86.4), format_duration(473), format_duration(7500), format_duration(None)
    ('86 s', '7 min 53 s', '2 h 05 min', 'unknown')
    """
    if not is_number(seconds):
        return UNKNOWN
    total = round(seconds)
    if total < 100:
        return f"{total} s"
    if total < 3600:
        return f"{total // 60} min {total % 60:02d} s"
    return f"{total // 3600:,} h {total % 3600 // 60:02d} min"


def render_table(
    columns: Sequence[str], rows: Iterable[Sequence[str]], *, is_large: bool = False
) -> str:
    """Return a table of HTML cells, whose first column is the heading of each row.

    On narrow screens it becomes a list; the cells of a large one are wrapped in print.
    """
    head = "".join(f'<th scope="col">{column}</th>' for column in columns)
    body = []
    for first, *others in rows:
        cells = "".join(
            f'<td><span class="column">{column}</span><span>{cell}</span></td>'
            for column, cell in zip(columns[1:], others, strict=True)
        )
        body.append(f'<tr><th scope="row">{first}</th>{cells}</tr>')
    head, lines = f"<thead><tr>{head}</tr></thead>", "\n".join(body)
    tag = '<table class="large">' if is_large else "<table>"
    return f'<div class="wide">{tag}{head}<tbody>\n{lines}\n</tbody></table></div>'


def keep_together(*parts: str) -> str:
    """Return HTML texts in a row, none of which is broken into lines."""
    return " ".join(f'<span class="whole">{part}</span>' for part in parts)


def render_list(items: Iterable[Any]) -> str:
    """Return a list of texts, which are escaped."""
    return "<ul>" + "".join(f"<li>{escape(item)}</li>" for item in items) + "</ul>"


def render_link(target: str, text: Any) -> str:
    """Return a link to a file, relative to the page."""
    # Quoted, a name like "javascript:x" is a file's and not a scheme.
    return f'<a href="{escape(quote(target, errors="replace"))}">{escape(text)}</a>'


def render_picture(path: Path, caption: str) -> str:
    """Return a figure that holds a PNG file, and leads to the file itself."""
    data = base64.b64encode(path.read_bytes()).decode("ascii")
    picture = f'<img alt="{escape(caption)}" src="data:image/png;base64,{data}">'
    target = escape(quote(path.name))
    return (
        f'<figure><a href="{target}">{picture}</a>'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def render_section(name: str, title: str, content: str) -> str:
    """Return a section with its heading, or nothing if it has no content."""
    if not content:
        return ""
    return f'<section id="{name}">\n<h2>{escape(title)}</h2>\n{content}\n</section>'


def render_contents(names: Iterable[tuple[str, str]]) -> str:
    """Return links to sections, given as their names and titles."""
    links = (f'<a href="#{name}">{escape(title)}</a>' for name, title in names)
    return f"<nav>{keep_together(*links)}</nav>"


def render_page(title: str, body: str) -> str:
    """Return the whole page; `title` is escaped, `body` is HTML."""
    return _PAGE.substitute(title=escape(title), style=_STYLE, body=body)


_PAGE = Template("""\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
$style</style>
</head>
<body>
$body
</body>
</html>
""")

_LIGHT = """\
  --text: #1f2328; --muted: #59636e; --line: #d1d9e0; --paper: #ffffff; --panel: #f6f8fa;
  --link: #0969da; --good: #1a7f37; --open: #9a6700; --bad: #c21f2c;
"""
_DARK = """\
  --text: #e6edf3; --muted: #9aa4af; --line: #3d444d; --paper: #0d1117; --panel: #161b22;
  --link: #58a6ff; --good: #3fb950; --open: #d9a520; --bad: #ff7b72;
"""
_STYLE = (
    f":root {{\n  color-scheme: light dark;\n{_LIGHT}}}\n"
    f"@media screen and (prefers-color-scheme: dark) {{ :root {{\n{_DARK}}} }}\n"
    """\
* { box-sizing: border-box; }
body {
  margin: 0 auto; padding: 1.5rem 1rem 3rem; max-width: 72rem; color: var(--text);
  background: var(--paper); font: 1rem/1.5 system-ui, "Segoe UI", Roboto, sans-serif;
  overflow-wrap: break-word;
}
h1 { margin: 0 0 0.25rem; font-size: 1.5rem; }
h2 { margin: 2.25rem 0 0.5rem; font-size: 1.2rem; border-bottom: 1px solid var(--line); }
h3 { margin: 1.25rem 0 0.25rem; font-size: 1rem; }
p, ul { margin: 0.4rem 0; }
ul { padding-left: 1.25rem; }
a { color: var(--link); }
.muted, small, figcaption { color: var(--muted); }
small { display: block; font-size: 0.8rem; font-weight: 400; line-height: 1.4; }
sub { line-height: 0; }
.whole { white-space: nowrap; }
nav { margin: 0.75rem 0; display: flex; flex-wrap: wrap; gap: 0.25rem 1rem; }
code { font: 0.9rem ui-monospace, Menlo, Consolas, monospace; }
pre { overflow-x: auto; padding: 0.6rem 0.8rem; background: var(--panel); border-radius: 0.4rem; }
.verdict {
  margin: 1rem 0; padding: 0.75rem 1rem; background: var(--panel); border-radius: 0.4rem;
  border-left: 0.6rem solid var(--state);
}
.verdict p { margin: 0; font-size: 1.15rem; }
.word { color: var(--state); font-weight: 700; }
.converged { --state: var(--good); }
.open { --state: var(--open); }
.wrong { --state: var(--bad); }
.rare { --state: var(--muted); }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: 0.35rem 0.9rem 0.35rem 0; text-align: left; vertical-align: top; }
tr { border-bottom: 1px solid var(--line); }
thead th:first-child { width: 24%; }
th[scope="row"] { min-width: 9rem; position: sticky; left: 0; background: var(--paper); }
#estimates thead th:first-child { width: 7rem; }
#estimates th[scope="row"] { min-width: 7rem; }
thead th { color: var(--muted); font-weight: 600; font-size: 0.9rem; }
td .column { display: none; }
figure { margin: 1rem 0; }
figure a { display: block; overflow-x: auto; background: #ffffff; border-radius: 0.4rem; }
img { display: block; width: 100%; height: auto; }
@media screen and (max-width: 46rem) {
  thead { display: none; }
  table, tbody, tr, th, td { display: block; width: 100%; }
  tr { padding: 0.4rem 0; }
  th, td { padding: 0.1rem 0; }
  td { display: flex; gap: 0.75rem; }
  td .column { display: block; flex: 0 0 8.5rem; color: var(--muted); font-size: 0.9rem; }
  td .column + span { flex: 1; min-width: 0; }
  td:has(.column + span:empty) { display: none; }
  img { min-width: 40rem; }
}
@media print {
  html { font-size: 9.5pt; }
  body { max-width: none; padding: 0; }
  h2, h3 { break-after: avoid; }
  tr, figure, .verdict { break-inside: avoid; }
  img { max-height: 22cm; width: auto; max-width: 100%; }
  a { color: inherit; text-decoration: none; }
  nav { display: none; }
  pre { white-space: pre-wrap; }
  .wide { overflow: visible; }
  .large thead { display: none; }
  .large, .large tbody { display: block; }
  .large tr { display: flex; flex-wrap: wrap; padding: 0.4rem 0; }
  .large th { flex: 0 0 100%; }
  .large td { flex: 0 0 33%; }
  .large td .column { display: block; color: var(--muted); }
}
"""
)
