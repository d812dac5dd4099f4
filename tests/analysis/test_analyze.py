"""Where the tables and figures of a run directory go."""

import html
import os
import re

import numpy as np
import pytest

from openmm_tsf.analysis import load_run
from openmm_tsf.analysis.analyze import analyze
from openmm_tsf.cli.main import main
from openmm_tsf.io.files import read_json
from tests.robustness.corpus import no_pictures
from tests.support.analysis_runs import small_run

RESULTS = {
    *("summary.json", "report.html", "ramachandran.png", "diagnostics.png"),
    *("thermodynamics.csv", "thermodynamics.json", "thermodynamics.png"),
}


@pytest.fixture(scope="module")
def run_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("analyze") / "run"
    small_run(path, n=20, positions=None, temperatures=np.array([300.0, 500.0]))
    return path


def contents(folder):
    """Names, sizes and times of everything in a directory, and of the directory itself."""
    paths = [folder, *sorted(folder.rglob("*"))]
    return [(str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in paths]


@pytest.fixture
def read_only(run_path, monkeypatch):
    """The operating system says that the run cannot be written to: root could."""
    access = os.access

    def refuse(path, mode, **options):
        if str(path).startswith(str(run_path)) and mode & os.W_OK:
            return False
        return access(path, mode, **options)

    monkeypatch.setattr(os, "access", refuse)


def test_a_run_that_cannot_be_written_to_is_analysed_elsewhere(
    run_path, read_only, tmp_path, capsys, monkeypatch
):
    before = contents(run_path)
    output = tmp_path / "new" / "results"
    assert main(["analyze", str(run_path), "--output", str(output), "--quiet"]) == 3
    assert {path.name for path in output.iterdir()} == RESULTS
    text = (output / "report.html").read_text(encoding="utf-8")
    links = set(re.findall(r'href="([^"#]+)"', text))
    config = os.path.relpath(run_path / "config.json", output)
    assert links == RESULTS - {"report.html"} | {config}
    assert all((output / link).is_file() for link in links)
    sentence = read_json(output / "summary.json")["verdict"]["sentence"]
    assert html.escape(sentence) in re.sub("</?span[^>]*>", "", text)
    printed = capsys.readouterr().out
    assert f"the plots are in {output}" in printed
    assert f"sample --output {run_path} --iterations" in printed
    assert main(["analyze", str(run_path), "--quiet"]) == 2  # before any work
    assert f"{run_path} cannot be written to; name another" in capsys.readouterr().err
    with pytest.raises(PermissionError, match="--output"):
        analyze(run_path, run_path / "inside")
    assert contents(run_path) == before


def test_results_of_an_earlier_analysis_are_replaced_and_other_files_are_not(run_path, tmp_path):
    (tmp_path / "summary.json").write_text("old")
    with no_pictures():
        summary = analyze(str(run_path), tmp_path)
    assert summary["n_iterations"] == 20
    assert "old" not in (tmp_path / "summary.json").read_text()
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"analysis or certificate, .* holds notes.txt"):
        analyze(run_path, tmp_path)
    for folder in (run_path / "segments", run_path.parent):  # of the run, or around it
        with pytest.raises(FileExistsError):
            analyze(run_path, folder)
    with pytest.raises(NotADirectoryError, match=r"output: .*notes.txt is a file"):
        analyze(run_path, tmp_path / "notes.txt")
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_the_run_itself_is_the_default(run_path):
    with no_pictures():
        analyze(run_path, os.path.relpath(run_path))
    assert {path.name for path in run_path.iterdir()} >= {"summary.json", "report.html"} <= RESULTS
    assert load_run(run_path).n_iterations == 20
