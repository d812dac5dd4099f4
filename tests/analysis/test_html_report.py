"""``report.html``: what it says, that it is one file, and that nothing from files is markup."""

import base64
import copy
import html
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest

from openmm_tsf.analysis.html_page import format_number, format_with_error
from openmm_tsf.analysis.html_report import write_report

VOID = {"meta", "img"}
TAGS = {
    *("html", "head", "meta", "title", "style", "body", "header", "nav", "section", "footer"),
    *("h1", "h2", "h3", "p", "div", "span", "small", "sub", "a", "ul", "li", "pre", "code"),
    *("table", "thead", "tbody", "tr", "th", "td", "figure", "img", "figcaption"),
}
ATTRIBUTES = {"lang", "charset", "http-equiv", "content", "name", "class", "id", "href", "scope"}
HOSTILE = "'\"><script>alert(1)</script><img src=x onerror=alert(1)>\x1b[2J\ud800\u202e&lt;$title"


class Page(HTMLParser):
    """The elements, texts and links of a page; all elements must be closed in order."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.texts, self._open = set(), [], [], []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes += attrs
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        if self._open[-1:] != ["style"]:
            self.texts.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.texts).replace("\xa0", " ").split())

    def values(self, name):
        return [value for key, value in self.attributes if key == name]


def estimate(value, stderr, **entries):
    limits = {"low": value - 2 * stderr, "high": value + 2 * stderr}
    fixed = {"n_eff": 400.0, "r_hat": 1.01, "n_visits": None, "status": "converged"}
    return {"value": value, "stderr": stderr} | limits | fixed | entries


@pytest.fixture
def summary():
    never = {"low": 0.0, "high": 0.0031, "n_eff": 12.0, "r_hat": None}
    hardly = {"low": 2e-5, "high": 9e-4, "expected_p": 4e-4, "expected_stderr": 3e-5}
    check = {"value": 0.049, "stderr": 0.004, "expected": 0.117, "n_eff": 132.0, "z": -16.0}
    unsure = {"z": None, "bound": "lower", "undecided": "3 effective samples"}
    means = {
        "z": {"300.00": -3.5},
        "reference": {"300.00": {"value": -59.21, "stderr": 0.08}},
        "chi2": 15.6,
        "p_value": 0.0035,
    }
    return {
        "temperatures_K": [300.0, 600.0],
        "n_walkers": 8,
        "n_iterations": 500,
        "n_samples_per_rung": 4000,
        "burn_in": {"start": 37},
        "quantities": {
            "energy_kJ_mol": {
                "300.00": estimate(-59.558, 0.065, status="wrong"),
                "600.00": estimate(13.73, 0.18),
            },
            "phi_positive": {
                "300.00": estimate(0.0203, 0.0012, n_visits=60),
                "600.00": estimate(0.07, 0.004, n_visits=90, status="not yet"),
            },
            "basin phi > 0, psi beta": {
                "300.00": estimate(0.0, 0.0, **never, n_visits=0, status="not yet"),
                "600.00": estimate(0.0002, 0.00015, n_visits=3, status="bounded", **hardly),
            },
        },
        "verdict": {
            "status": "wrong",
            "sentence": "wrong: <U> differs",
            "wrong": ["300.00 K: <U> differs from the reference by -3.5 standard errors"],
            "missing": ["300.00 K: P(phi > 0, psi beta): 0 visits"],
            "undecided": ["300.00-600.00 K: cannot be tested"],
            "warnings": ["frames are stuck"],
            "advice": ["compare the time step"],
            "predicted": {
                "n_iterations": 4200,
                "energy_evaluations": 3_800_000,
                "wall_seconds": 330.0,
                "at_least": True,
            },
        },
        "acceptance": {
            "flow_walk": {"300.00": 0.3, "600.00": 0.31},
            "swap_steered": [0.788],
            "swap_plain": [[None, 0.25], [0.25, None]],
        },
        "round_trips": 12,
        "replica_relaxation": {"iterations": 2.5},
        "energy_evaluations": {"md": 1000, "training": 200, "sampling": 30},
        "wall_seconds": {"md": None, "training": 473.0, "sampling": 86.0},
        "ensemble_check": {
            "energy_ratio_mol_kJ": {"300.00-600.00": check},
            "basin_ratio": {"phi > 0, psi beta": {"300.00-600.00": check | unsure}},
        },
        "monitor": {"notes": ["a branch cut"], "warnings": []},
        "comparison": {
            "energy_kJ_mol": means,
            "basins": {"phi > 0, psi beta": means | {"chi2": None, "p_value": None}},
            "ramachandran": {"300.00": {"total_variation": 0.073, "floor_total_variation": None}},
        },
        "versions": {"openmm": "8.6.1"},
    }


def page_of(summary, folder, **options):
    write_report(summary, folder, **options)
    return Page((Path(folder) / "report.html").read_text(encoding="utf-8"))


def test_the_page_says_what_the_summary_holds(summary, tmp_path):
    page = page_of(summary, tmp_path, name="run 7")
    for words in (
        *(
            "cannot decide",
            "run 7",
            "8 walkers",
            "500 iterations",
            "burn-in of 37 iterations left out",
        ),
        *("wrong : <U> differs", "Wrong beyond the errors", "Missing for convergence"),
        *("Checks that cannot decide", "frames are stuck", "compare the time step"),
        *("−59.558 ± 0.065", "95 %: −59.688 to −59.428", "reference −59.210 ± 0.080 (z −3.5)"),
        *("P(phi > 0)", "0.0203 ± 0.0012", "visits 60", "phi > 0, psi beta"),
        *("never seen: at most 0.0031", "0.00002 to 0.00090", "estimate 0.00020 ± 0.00015"),
        *("expected 0.000400 ± 0.000030", "rare: a bound is enough"),
        *(
            "0.0490 ± 0.0040",
            "0.1170",
            "−16.0",
            "at least 0.0490",
            "3 effective samples",
            "a branch cut",
            "15.6",
            "0.0035",
        ),
        *("0.788", "0.250", "round trips of the temperature ladder: 12", "7 min 53 s", "unknown"),
        *("At least 4,200 iterations of production", "3,800,000 energy evaluations, 5 min 30 s"),
        "openmm 8.6.1",
    ):
        assert words in page.text, words
    for word in ("nan", "None", "inf "):
        assert word not in page.text
    assert page.tags <= TAGS


@pytest.mark.parametrize(
    ("status", "words", "style"),
    [("converged", "converged", "converged"), ("not yet", "not yet converged", "open"),
     ("wrong", "wrong", "wrong")],
)  # fmt: skip
def test_the_verdict_has_a_word_and_a_colour(summary, tmp_path, status, words, style):
    verdict = {"status": status, "sentence": f"{words}, as we know"}
    page = page_of(summary | {"verdict": verdict}, tmp_path)
    assert f"verdict {style}" in page.values("class")
    assert page.texts[page.texts.index(words) + 1] == ", as we know"
    assert not {"#reasons", "#next"} & set(page.values("href"))  # there are none


def test_a_run_that_is_too_short_has_the_command_that_lengthens_it(summary, tmp_path):
    command = "openmm-tsf sample --output 'run 7' --iterations 4200 --resume"
    assert command not in page_of(summary, tmp_path, name="run 7").text  # it is wrong
    summary["verdict"]["status"] = "not yet"
    assert command in page_of(summary, tmp_path, name="run 7").text


def without(content, path):
    """A copy of nested dictionaries that lacks one entry."""
    content = copy.deepcopy(content)
    table = content
    for key in path[:-1]:
        table = table[key]
    del table[path[-1]]
    return content


def paths(content, path=()):
    for key, value in content.items():
        yield (*path, key)
        if isinstance(value, dict):
            yield from paths(value, (*path, key))


def test_what_is_missing_is_left_out(summary, tmp_path):
    every = list(paths(summary))
    assert len(every) > 100
    for path in every:
        page_of(without(summary, path), tmp_path)
    page = page_of({}, tmp_path)
    assert page.text == "Temperature-steerable flow Temperature-steerable flow"
    assert page_of(without(summary, ("quantities",)), tmp_path).values("href")[1] == "#checks"


def test_numbers_that_are_not_known_are_called_so(summary, tmp_path):
    def unknown(content):
        if isinstance(content, dict):
            return {key: unknown(value) for key, value in content.items()}
        return None if isinstance(content, (int, float)) else content

    page = page_of(unknown(summary), tmp_path)
    assert "unknown ± unknown" in page.text
    assert "None" not in page.text


def hostile(content):
    """The same numbers with hostile texts, under the same keys and under hostile ones."""
    if isinstance(content, dict):
        values = {key: hostile(value) for key, value in content.items()}
        return values | {f"{key}{HOSTILE}": value for key, value in values.items()}
    if isinstance(content, list):
        return [hostile(value) for value in content]
    return HOSTILE if isinstance(content, str) else content


def test_nothing_from_files_is_markup(summary, tmp_path):
    files = [f"../{HOSTILE}/flow.pt", "javascript:alert(1)", "a b#c?d%.dcd", "é.dcd"]
    page = page_of(hostile(summary), tmp_path, name=HOSTILE, files=files)
    assert page.tags <= TAGS
    assert {name for name, _ in page.attributes} <= ATTRIBUTES
    shown = "'\"><script>alert(1)</script><img src=x onerror=alert(1)>?[2J??&lt;$title"
    assert page.text.count(shown) > 20
    links = [link for link in page.values("href") if not link.startswith("#")]
    assert not [link for link in links if ":" in link or not link.isascii()]
    assert [unquote(link) for link in links[1:]] == files[1:]


def test_the_page_is_one_file_without_scripts(summary, tmp_path):
    picture = b"\x89PNG\r\n\x1a\nnot a picture"
    (tmp_path / "ramachandran.png").write_bytes(picture)
    (tmp_path / "summary.json").write_text("{}")
    page = page_of(summary, tmp_path, files=["../run/T300.00K.dcd"])
    (source,) = page.values("src")
    kind, data = source.split(",")
    assert kind == "data:image/png;base64"
    assert base64.b64decode(data) == picture
    links = {link for link in page.values("href") if not link.startswith("#")}
    assert links == {"ramachandran.png", "summary.json", "../run/T300.00K.dcd"}
    ids = set(page.values("id"))
    assert {link[1:] for link in page.values("href") if link.startswith("#")} == ids
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "default-src 'none'" in html.unescape(text)
    assert not {"http:", "https:", "url(", "@import"} & set(text.replace("(", "( ").split())
    write_report(summary, tmp_path, files=["../run/T300.00K.dcd"])
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == text


@pytest.mark.parametrize(
    ("value", "stderr", "text"),
    [(-59.5579, 0.06458, "−59.558 ± 0.065"), (0.02, 0.0, "0.0200 ± 0.0000"),
     (None, None, "unknown ± unknown"), (float("nan"), float("inf"), "unknown ± unknown"),
     (12345.6, 123.4, "12,346 ± 123"), (1.0, 1e-30, "1.000000000000 ± 0.000000000000")],
)  # fmt: skip
def test_values_are_shown_to_two_digits_of_their_errors(value, stderr, text):
    assert format_with_error(value, stderr) == text


def test_what_is_not_a_number_is_escaped():
    assert format_number("<b>", 2) == "&lt;b&gt;"


def test_huge_numbers_stay_within_their_cells():
    assert format_number(-1e300, 3) == "\N{MINUS SIGN}1e+300"
    assert format_number(10**25, 0) == "1e+25"
    assert format_number(999_999_999_999, 0) == "999,999,999,999"
