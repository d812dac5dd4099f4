"""The doctor: a complete report without secrets, and a self-test that can fail."""

import json
import math
import os
import re
import shutil
import tempfile
import warnings
from pathlib import Path
from types import SimpleNamespace

import openmm
import pytest
import torch

from openmm_tsf.cli.main import main
from openmm_tsf.doctor import Report, examine, probes, report, self_test
from openmm_tsf.doctor.self_test import Deviation, SelfTestResult
from openmm_tsf.io.files import write_json
from openmm_tsf.io.run_config import CONFIG_FORMAT
from openmm_tsf.utils.versions import package_versions

TITLES = ("versions", "machine", "OpenMM platforms", "torch", "environment", "shipped data")


@pytest.fixture
def quick(monkeypatch):
    """Replace the self-test by one result that passed."""
    monkeypatch.setattr(report, "self_test", lambda platforms: [SelfTestResult("nothing")])


def test_the_report_is_complete(capsys):
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert [line for line in text.splitlines() if line in TITLES] == list(TITLES)
    for name in (
        "python", "openmm-tsf", "torch", "processor", "cores", "memory", "temporary files",
        "Reference", "CPU", "plugins that failed", "CUDA", "devices", "C++ compiler",
        "compile cache", "ala2_600K.dcd",
    ):  # fmt: skip
        assert f"\n  {name} " in text
    assert "failed:" not in text
    assert "\nself-test ok: 10 of 10 checks passed, in " in text
    for force_field in self_test.FORCE_FIELDS:
        for what in ("Reference", "CPU", "TorchPotential", "internal coordinates", "untrained"):
            assert f"\n  ok     {force_field} {what}" in text
    assert text.count("evaluations/s") == 6


def test_the_speed_of_double_precision_is_stated_for_each_card(monkeypatch):
    cards = [
        ("NVIDIA H200", 9, 0), ("NVIDIA A100", 8, 0), ("NVIDIA GeForce RTX 4090", 8, 9),
        ("Quadro RTX 6000", 7, 5), ("a later card", 14, 0),
    ]  # fmt: skip
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(cards))
    monkeypatch.setattr(
        torch.cuda,
        "get_device_properties",
        lambda i: SimpleNamespace(
            name=cards[i][0], total_memory=2**34, major=cards[i][1], minor=cards[i][2]
        ),
    )
    half, thirty, sixty = (f"float64 at 1/{n} of the speed of float32" for n in (2, 32, 64))
    used = ", and a run computes energies and the flow in float64"
    lines = probes.torch_devices()["CUDA"]
    assert lines == [
        f"0: NVIDIA H200, 16.0 GiB, compute capability 9.0, {half}",
        f"1: NVIDIA A100, 16.0 GiB, compute capability 8.0, {half}",
        f"2: NVIDIA GeForce RTX 4090, 16.0 GiB, compute capability 8.9, {sixty}{used}",
        f"3: Quadro RTX 6000, 16.0 GiB, compute capability 7.5, {thirty}{used}",
        "4: a later card, 16.0 GiB, compute capability 14.0, speed of float64 unknown",
    ]
    monkeypatch.setattr(torch.version, "hip", "6.4")  # AMD counts its cards in another way
    assert probes.torch_devices()["CUDA"][0].endswith("9.0, speed of float64 unknown")


def test_a_wrong_potential_fails_and_the_other_tests_run(monkeypatch, capsys):
    right = self_test.TorchPotential.energy_and_forces

    def wrong(self, x):
        energies, forces = right(self, x)
        return energies + 1e-3, forces

    def broken(self, u, like):
        raise RuntimeError("no coordinates")

    monkeypatch.setattr(self_test.TorchPotential, "energy_and_forces", wrong)
    monkeypatch.setattr(self_test.InternalCoordinates, "place", broken)
    monkeypatch.setattr(self_test, "RATE_SECONDS", 0.0)
    monkeypatch.setattr(self_test, "FORCE_FIELDS", ("amber99sbildn-obc2", "unknown"))
    assert main(["doctor", "--json"]) == 1
    content = json.loads(capsys.readouterr().out)
    assert set(content) == {"ok", "self-test", "self-test seconds", *TITLES}
    assert content["versions"]["torch"] == torch.__version__
    assert content["ok"] is False
    prefix = "amber99sbildn-obc2 "
    by_name = {test["name"].removeprefix(prefix): test for test in content["self-test"]}
    assert by_name["TorchPotential"]["figures"]["energies"]["value"] == pytest.approx(1e-3)
    assert by_name["internal coordinates"]["problem"] == "RuntimeError: no coordinates"
    assert by_name["unknown"]["problem"].startswith("ValueError: force_field: expected")
    passed = {name for name, test in by_name.items() if test["ok"]}
    assert passed == {"Reference", "CPU", "untrained flow"}


def test_nan_fails():
    result = SelfTestResult("x", (Deviation("error", math.nan, 1.0),))
    assert not result.ok
    assert str(result).startswith("FAILED x: error nan")
    content = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert content["figures"]["error"]["value"] is None
    assert str(SelfTestResult("y", problem="missing")) == "FAILED y: missing"


def test_no_secrets(quick, monkeypatch, tmp_path):
    home = tmp_path / "alice"
    (home / "run").mkdir(parents=True)
    (home / "run" / "config.json").write_text("{")
    variables = {
        "HOME": home, "USERPROFILE": home, "LOGNAME": "alice-login", "SECRET_TOKEN": "xyzzy",
        "OPENBLAS_NUM_THREADS": "3", "OPENMM_PLUGIN_DIR": home / "plugins",
    }  # fmt: skip
    for name, value in variables.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    result = examine(home / "run")
    for text in (str(result), json.dumps(result.to_dict())):
        assert not re.search("alice|xyzzy|SECRET_TOKEN", text)
        assert {"~/run/config.json", "~/plugins"} <= set(re.findall(r"~/[\w./]+\w", text))
    assert result.to_dict()["environment"]["OPENBLAS_NUM_THREADS"] == "3"
    assert set(result.sections["environment"]) <= {*probes.VARIABLES, "OPENBLAS_NUM_THREADS"}


def test_a_machine_that_lacks_everything(quick, monkeypatch):
    def fails(*args, **options):
        raise OSError("not on\x1b this machine")

    monkeypatch.setenv("CXX", "no-such-compiler")
    with monkeypatch.context() as patch:
        patch.setattr(probes, "version", fails)
        with pytest.raises(OSError, match="not on"):
            examine()  # only a package that is missing is expected
    for owner, name, replacement in (
        (report, "self_test", lambda platforms: [SelfTestResult(",".join(platforms))]),
        (torch.cuda, "is_available", fails),
        (openmm, "Context", fails),
        (shutil, "which", lambda name: None),
        (tempfile, "TemporaryFile", fails),
        (Path, "is_file", lambda self: False),  # no /proc either
    ):
        monkeypatch.setattr(owner, name, replacement)
    result = examine()
    assert result.results == (SelfTestResult(""),)  # no platform is left to test
    text = str(result)
    assert "failed: OSError: not on? this machine" in text
    assert "speed 10, does not run: OSError: not on? this machine" in text
    assert result.sections["machine"]["memory"] == "unknown"
    assert result.sections["torch"]["C++ compiler"].startswith("none: torch takes ")


def test_a_missing_compiler_is_reported():
    from torch._inductor import config, cpp_builder

    cpp_builder.cpp_compiler_search.cache_clear()
    with config.patch({"cpp.cxx": ("no-such-compiler",)}):
        line = probes.torch_devices()["C++ compiler"]
    cpp_builder.cpp_compiler_search.cache_clear()
    assert "no-such-compiler" in line or "InvalidCxxCompiler" in line


def test_warnings_are_reported():
    def warns():
        warnings.warn("an old driver", stacklevel=1)
        return "not available"

    assert probes.run_probe(warns) == ["not available", "warning: an old driver"]


@pytest.fixture
def folder(tmp_path):
    config = {
        "format": CONFIG_FORMAT,
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


def test_a_directory_is_described(folder, quick, capsys):
    assert main(["doctor", str(folder)]) == 0
    text = capsys.readouterr().out
    content = examine(folder).to_dict()["directory"]
    assert content["stage"] == "md"
    assert content["progress"] == [
        "n_frames: 123", "wall_seconds: 1.5", "n_frames requested: 400", "segments: 1"
    ]  # fmt: skip
    assert content["other versions"] == [
        f'config.json: openmm: "8.1", now {package_versions()["openmm"]}',
        'config.json: other: "3", now unknown',
    ]
    assert {"md.dcd: 2.0 KiB", "segments/: 1 files, 10 B"} <= set(content["files"])
    assert content["choices"] == ['platform: "CPU"']
    assert all(line in text for line in content["progress"])
    assert "damaged" not in content


@pytest.mark.parametrize(
    "damage", ["", "{", "[]", '"text"', "\x00\xff", "[" * 100_000, '{"a": 1'], ids=range(7)
)
def test_damaged_files_are_named(folder, quick, damage):
    (folder / "config.json").write_text(damage, encoding="latin-1")
    write_json(folder / "summary.json", {"n_iterations": 7})
    result = examine(folder)
    content = result.to_dict()["directory"]
    assert result.ok
    (damaged,) = content["damaged"]
    assert "config.json" in damaged
    assert content["stage"] == "unknown"
    assert "n_iterations of summary.json: 7" in content["progress"]


@pytest.mark.parametrize("name", ["progress", "choices", "versions", "settings", "stage"])
@pytest.mark.parametrize("value", [None, 3, "text", [1], {"a": {"b": [None]}}])
def test_unexpected_contents_are_reported(folder, name, value):
    config = json.loads((folder / "config.json").read_text())
    write_json(folder / "config.json", config | {name: value})
    assert "failed" not in json.dumps(probes.describe_directory(folder))


def test_control_characters_and_many_files(folder):
    if os.name == "posix":
        (folder / "a\x1b[31m\n").touch()
        os.close(os.open(os.fsencode(str(folder)) + b"/\xff", os.O_CREAT))
        (folder / "dangling").symlink_to("nowhere")
    for number in range(60):
        (folder / f"z{number:03d}").touch()
    text = str(Report({"directory": probes.describe_directory(folder)}, (), 0.0))
    text.encode()
    assert "\x1b" not in text
    assert " more\n" in text


def test_no_directory(tmp_path, capsys):
    assert main(["doctor", str(tmp_path / "no")]) == 2
    assert "directory: no such directory" in capsys.readouterr().err
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match="got the file"):
        examine(tmp_path / "file")
