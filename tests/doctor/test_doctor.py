"""The doctor: everything a bug report needs, no secrets, and a self-test that can fail."""

import json
import math
import os
import shutil
import tempfile
from pathlib import Path

import pytest
import torch

from openmm_tsf.cli import main as cli
from openmm_tsf.doctor import probes as doctor_probes
from openmm_tsf.doctor import report as doctor
from openmm_tsf.doctor import self_test
from openmm_tsf.doctor.self_test import Check, Figure
from openmm_tsf.io.files import write_json
from openmm_tsf.utils.versions import package_versions

TITLES = ("versions", "machine", "OpenMM platforms", "torch", "environment", "shipped data")


@pytest.fixture
def quick(monkeypatch):
    """No self-test: one check that passes."""
    monkeypatch.setattr(doctor, "self_test", lambda platforms: [Check("nothing")])


def test_all_is_well_here_and_said(capsys):
    assert cli.main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert [line for line in text.splitlines() if line in TITLES] == list(TITLES)
    for name in (
        "python", "openmm-tsf", "torch", "processor", "cores", "memory", "temporary files",
        "Reference", "CPU", "plugins that failed", "CUDA", "C++ compiler", "compile cache",
        "ala2_600K.dcd",
    ):  # fmt: skip
        assert f"\n  {name} " in text
    assert "failed:" not in text
    assert "\nself-test ok: 10 of 10 checks passed, in " in text
    for force_field in self_test.FORCE_FIELDS:
        for what in ("Reference", "CPU", "TorchPotential", "internal coordinates", "untrained"):
            assert f"\n  ok     {force_field} {what}" in text
    assert text.count("evaluations/s") == 6


def test_a_wrong_potential_fails_and_the_rest_goes_on(monkeypatch, capsys):
    right = self_test.TorchPotential.energy_and_forces

    def wrong(self, x):
        energies, forces = right(self, x)
        return energies + 1e-3, forces

    def broken(self, u, like):
        raise RuntimeError("no coordinates today")

    monkeypatch.setattr(self_test.TorchPotential, "energy_and_forces", wrong)
    monkeypatch.setattr(self_test.InternalCoordinates, "place", broken)
    monkeypatch.setattr(self_test, "_RATE_SECONDS", 0.0)
    monkeypatch.setattr(self_test, "FORCE_FIELDS", ("amber99sbildn-obc2", "no such"))
    assert cli.main(["doctor", "--json"]) == 1
    content = json.loads(capsys.readouterr().out)
    assert content["ok"] is False
    by_name = {
        check["name"].removeprefix("amber99sbildn-obc2 "): check for check in content["self-test"]
    }
    bad = by_name["TorchPotential"]["figures"]["energies"]
    assert bad["value"] == pytest.approx(1e-3)
    assert by_name["internal coordinates"]["problem"] == "RuntimeError: no coordinates today"
    assert by_name["no such"]["problem"].startswith("ValueError: force_field: expected")
    assert {name for name, check in by_name.items() if check["ok"]} == {
        "Reference", "CPU", "untrained flow"
    }  # fmt: skip


def test_what_is_not_a_number_fails():
    check = Check("x", (Figure("error", math.nan, 1.0),))
    assert not check.ok
    assert str(check).startswith("FAILED x: error nan")
    assert (
        json.loads(json.dumps(check.to_dict(), allow_nan=False))["figures"]["error"]["value"]
        is None
    )
    assert str(Check("y", problem="none here")) == "FAILED y: none here"


def test_json_says_the_same(quick, capsys):
    assert cli.main(["doctor", "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert set(content) == {"ok", "self-test", "self-test seconds", *TITLES}
    assert content["versions"]["torch"] == torch.__version__


def test_no_secrets(quick, monkeypatch, tmp_path):
    home = tmp_path / "alice"
    (home / "run").mkdir(parents=True)
    (home / "run" / "config.json").write_text("{")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("USERPROFILE", str(home))
    monkeypatch.setenv("LOGNAME", "alice-login")
    monkeypatch.setenv("SECRET_TOKEN", "xyzzy")
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "3")
    monkeypatch.setenv("OPENMM_PLUGIN_DIR", str(home / "plugins"))
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    report = doctor.examine(home / "run")
    for text in (str(report), json.dumps(report.to_dict())):
        assert "alice" not in text
        assert "xyzzy" not in text
        assert "SECRET_TOKEN" not in text
        assert "~/run/config.json" in text
        assert "~/plugins" in text
    assert report.to_dict()["environment"]["OPENBLAS_NUM_THREADS"] == "3"
    assert set(report.sections["environment"]) <= {
        *doctor_probes._VARIABLES, "OPENBLAS_NUM_THREADS"
    }  # fmt: skip


def test_a_machine_that_lacks_everything(quick, monkeypatch):
    def fails(*args, **options):
        raise OSError("not on\x1b this machine")

    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr(torch.cuda, "is_available", fails)
    monkeypatch.setattr(doctor_probes, "_properties", fails)
    monkeypatch.setattr(doctor_probes, "_compiler", fails)
    monkeypatch.setattr(doctor_probes, "version", lambda name: fails())
    monkeypatch.setattr(tempfile, "TemporaryFile", fails)
    monkeypatch.setattr(Path, "is_file", lambda self: False)  # no /proc either
    with pytest.raises(OSError, match="not on"):
        doctor.examine()  # versions: only a package that is missing is expected
    monkeypatch.undo()
    monkeypatch.setattr(doctor, "self_test", lambda platforms: [Check(",".join(platforms))])
    monkeypatch.setattr(torch.cuda, "is_available", fails)
    monkeypatch.setattr(doctor_probes, "_properties", fails)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(tempfile, "TemporaryFile", fails)
    monkeypatch.setattr(Path, "is_file", lambda self: False)
    report = doctor.examine()
    assert report.ok
    assert report.checks == (Check(""),)  # no platform is left to test
    text = str(report)
    assert "failed: OSError: not on? this machine" in text
    assert "speed 10, does not run: OSError: not on? this machine" in text
    assert report.sections["machine"]["memory"] == "unknown"
    assert report.sections["torch"]["C++ compiler"].startswith("none: torch takes ")


def test_missing_compiler_is_a_line():
    from torch._inductor import config, cpp_builder

    cpp_builder.cpp_compiler_search.cache_clear()
    try:
        with config.patch({"cpp.cxx": ("no-such-compiler",)}):
            found = doctor_probes.torch_devices()["C++ compiler"]
    finally:
        cpp_builder.cpp_compiler_search.cache_clear()
    assert "no-such-compiler" in found or "InvalidCxxCompiler" in found


def test_warnings_are_lines():
    def warns():
        import warnings

        warnings.warn("an old driver", stacklevel=1)
        return "not available"

    assert doctor_probes.probed(warns) == ["not available", "warning: an old driver"]


# -- directories -----------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    config = {
        "format": 1,
        "stage": "md",
        "choices": {"platform": "CPU", "settings": {"n_frames": 400}},
        "progress": {"n_frames": 123, "wall_seconds": 1.5},
        "versions": package_versions() | {"openmm": "8.1", "other": "3"},
    }
    write_json(tmp_path / "config.json", config)
    (tmp_path / "md.dcd").write_bytes(b"x" * 2048)
    (tmp_path / "segments").mkdir()
    (tmp_path / "segments" / "segment_000000.npz").write_bytes(b"y" * 10)
    return tmp_path


def test_what_lies_in_a_directory(folder, quick, capsys):
    assert cli.main(["doctor", str(folder)]) == 0
    text = capsys.readouterr().out
    content = doctor.examine(folder).to_dict()["directory"]
    assert content["stage"] == "md"
    assert content["progress"] == [
        "n_frames: 123", "wall_seconds: 1.5", "n_frames asked for: 400", "segments: 1"
    ]  # fmt: skip
    now = package_versions()["openmm"]
    assert content["other versions"] == [
        f'config.json: openmm: "8.1", now {now}', 'config.json: other: "3", now not looked for'
    ]  # fmt: skip
    assert "md.dcd: 2.0 KiB" in content["files"]
    assert "segments/: 1 files, 10 B" in content["files"]
    assert content["choices"] == ['platform: "CPU"']
    for line in content["progress"]:
        assert line in text
    assert "damaged" not in content


@pytest.mark.parametrize(
    "damage", ["", "{", "[]", '"text"', "\x00\xff", "[" * 100_000, '{"a": 1'], ids=range(7)
)
def test_damaged_files_are_named(folder, quick, damage):
    (folder / "config.json").write_text(damage, encoding="latin-1")
    write_json(folder / "summary.json", {"n_iterations": 7})
    report = doctor.examine(folder)
    content = report.to_dict()["directory"]
    assert report.ok
    assert len(content["damaged"]) == 1
    assert "config.json" in content["damaged"][0]
    assert content["stage"] == "unknown"
    assert "n_iterations of summary.json: 7" in content["progress"]


@pytest.mark.parametrize("name", ["progress", "choices", "versions", "settings", "stage"])
@pytest.mark.parametrize("value", [None, 3, "text", [1], {"a": {"b": [None]}}])
def test_strange_contents_are_no_matter(folder, name, value):
    config = json.loads((folder / "config.json").read_text())
    write_json(folder / "config.json", config | {name: value})
    content = doctor_probes.directory(folder)
    assert "failed" not in json.dumps(content)


def test_strange_names_and_many_files(folder):
    if os.name == "posix":
        (folder / "a\x1b[31m\n").touch()
        os.close(os.open(os.fsencode(str(folder)) + b"/\xff", os.O_CREAT))
        (folder / "dangling").symlink_to("nowhere")
    for number in range(60):
        (folder / f"z{number:03d}").touch()
    content = doctor.Report({"directory": doctor_probes.directory(folder)}, (), 0.0)
    text = str(content)
    text.encode()
    assert "\x1b" not in text
    assert " more\n" in text


def test_no_directory(tmp_path, capsys):
    assert cli.main(["doctor", str(tmp_path / "no")]) == 2
    assert "directory: no such directory" in capsys.readouterr().err
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match="got the file"):
        doctor.examine(tmp_path / "file")
