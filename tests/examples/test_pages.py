"""The README and the other pages: their code runs, their commands, links and settings exist."""

import re
import shlex
from dataclasses import fields

import pytest

from openmm_tsf import FitSettings
from openmm_tsf.cli.arguments import build_parser
from tests.support.examples import EXAMPLES, code_blocks, run_source, shortened

ROOT = EXAMPLES.parent
README = ROOT / "README.md"
PAGES = (
    README,
    EXAMPLES / "troubleshooting.md",
    EXAMPLES / "results" / "README.md",
    EXAMPLES / "cluster" / "README.md",
)


def commands(page):
    """Return the openmm-tsf commands of a page: in shell blocks, and whole ones in back-ticks."""
    text = page.read_text()
    lines = [line for block in code_blocks(page, "sh") for line in block.splitlines()]
    spans = re.findall(r"`(openmm-tsf \w+ [^`]*)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    candidates = [" ".join(line.split()) for line in (*lines, *spans)]
    return [line[line.index("openmm-tsf ") :] for line in candidates if "openmm-tsf " in line]


def anchors(page):
    """Return the anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_readme_is_short():
    assert README.read_text().count("\n") <= 150


def test_the_python_example_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (source,) = code_blocks(README, "python")
    changes = {
        ".shipped(molecule)": ".shipped(molecule, stride=40)",
        "(dataset, seed=1)": "(dataset, seed=1, n_blocks=2, hidden=(16,))",
        "potential=molecule.potential())": "potential=molecule.potential(), "
        "settings=tsf.FitSettings(n_steps=4))",
        "n_walkers=64": "n_walkers=4",
        "tune(200)": "tune(2)",
        "n_iterations=2000": "n_iterations=4",
    }
    variables = run_source(shortened(source, changes))
    assert variables["phi"].shape == variables["psi"].shape == (4 * 4,)
    assert (tmp_path / "ramachandran.png").stat().st_size > 10_000


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_parse(page):
    listed = commands(page)
    assert listed
    for command in listed:
        arguments = shlex.split(command, comments=True)[1:]
        build_parser().parse_args(arguments)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_files_exist(page):
    text = page.read_text()
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if link.startswith("http"):
            continue
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link
    for name in re.findall(r"(?:examples|tests|data|openmm_tsf)/[\w/]+\.(?:py|md|json|png)", text):
        assert (ROOT / name).exists(), name


def test_the_settings_named_in_the_troubleshooting_exist():
    names = {field.name for field in fields(FitSettings)}
    text = (EXAMPLES / "troubleshooting.md").read_text()
    training = text[text.index("## Training") : text.index("## Sampling")]
    expected = set(re.findall(r"`(\w+)(?:=[^`]*)?`", training)) - {"score", "default"}
    assert {"learning_rate", "basin_balance", "n_chains", "estimator"} <= expected
    assert expected <= names


def test_the_messages_quoted_in_the_troubleshooting_exist():
    """Numbers and what is filled in are left out of the comparison."""

    def normal(text):
        return re.sub(r"\{[^}]*\}|\d+", "#", " ".join(text.split())).lower()

    source = "".join(path.read_text() for path in (ROOT / "openmm_tsf").rglob("*.py"))
    messages = normal(re.sub(r'"\s*f?"', "", source))
    quotes = re.findall(r'(?<!=)"([^"`=]+)"', (EXAMPLES / "troubleshooting.md").read_text())
    parts = [normal(part) for quote in quotes for part in quote.split("...")]
    assert len(parts) > 12
    assert [part for part in parts if part not in messages] == []
