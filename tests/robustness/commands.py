"""Command lines with all options of every command, and with good and bad values."""

import argparse
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest import mock

import openmm
from hypothesis import strategies as st

from openmm_tsf.cli.arguments import build_parser
from openmm_tsf.sampling import ParallelTempering
from openmm_tsf.systems.dataset import MDDataset
from openmm_tsf.training.trainer import Trainer
from openmm_tsf.utils.validation import check_int
from openmm_tsf.workflow.presets import PRESETS
from openmm_tsf.workflow.settings import MDSettings
from tests.robustness import corpus
from tests.robustness.readers import cut_short, judge
from tests.robustness.sandbox import Outcome

COMMANDS = ("run", "md", "train", "sample", "analyze", "doctor")

#: Values of integer options: good ones, numbers of other kinds, and words.
INTEGERS = [
    "1", "2", "3", "8", "0", "-1", "7.5", "1e3", "99999999999", "9223372036854775807",
    "18446744073709551616", "1" * 100, "nan", "", "x", "٣", "1_0", "0x10", "2147483648",
]  # fmt: skip
FLOATS = [
    "1", "300", "600.0", "0.002", "0", "-1", "-0.0", "nan", "inf", "-inf", "1e-320", "1e308",
    "1e400", "1e10", "", "x", "0.001", "6e2", "1_0",
]  # fmt: skip
TEXT = [
    "", "Reference", "CPU", "CUDA", "reference", "\x1b[2J", "../x", "ü", "a b", "{0}", "%s",
    "\udcff",
]  # fmt: skip
LADDERS = ["300 600", "300 424.26 600", "300 300.001", "600 300", "1e5"]
PATHS = [
    "missing", "foreign", "md", "md/md.dcd", "frames.dcd", "frames.nc", "train", "train/flow.pt",
    "sample", "sample/checkpoint.pt", "killed", "sample/config.json", "sample/topology.pdb",
    "sample/system.xml", "md/system.xml", "fifo", "fifo.dcd", "loop", "zero", "zero.dcd",
    "/dev/null", "/dev/zero", "/proc/self/mem", "/proc/self/fd/0", "", ".", "..", "x" * 300,
    "a\x00b", "ü.dcd", "\x1b[2J.dcd", "\udcff", "-", "foreign/thesis.txt", "~", "$HOME",
    "sample/T500.00K.dcd", "dangling", "amber14-all.xml", "implicit/obc2.xml", "directory.dcd",
]  # fmt: skip
OUTPUTS = [
    "new", "new", "new", "new/deeper", "new/", "./new", "empty", "foreign", "foreign/new", "md",
    "train", "sample", "killed", "frames.dcd", "frames.dcd/x", "fifo", "loop", "loop/x", "link",
    "dangling", "/dev/null", "/dev/null/x", "/dev/zero", "/proc/x", "/sys/x", "", ".", "y" * 300,
    "a\x00b", "ünï", "\x1b[2J", "\udcff", "fifo/x", "zero", "foreign/thesis.txt",
    "sample/segments",
]  # fmt: skip

#: Options with which a command works, so that not all are refused by the first check.
SENSIBLE = {
    "run": ["--trajectory frames.dcd --temperature 600", "--preset quick", "--md", ""],
    "md": ["--frames 2", "--frames 2 --temperature 500", ""],
    "train": ["--trajectory frames.dcd --temperature 600", "--trajectory md", ""],
    "sample": ["--flow train", "--flow train/flow.pt --walkers 2", ""],
    "analyze": [""],
    "doctor": [""],
}


def options_of(command: str) -> dict[str, argparse.Action]:
    """Return the options of a command; its positional argument is named ``""``."""
    parser = build_parser()
    (commands,) = (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    return {
        action.option_strings[-1] if action.option_strings else "": action
        for action in commands.choices[command]._actions
        if action.dest not in ("help", "debug")  # debug shows tracebacks
    }


@st.composite
def lines(draw: Any, command: str) -> list[str]:
    """Draw the arguments of a command."""
    options = options_of(command)
    arguments = [command]
    if "--output" in options and draw(st.integers(0, 19)):
        arguments += ["--output", draw(st.sampled_from(OUTPUTS))]
    if "" in options and draw(st.integers(0, 9)):
        arguments.append(draw(st.sampled_from(OUTPUTS)))
    arguments += draw(st.sampled_from(SENSIBLE[command])).split()
    if draw(st.integers(0, 3)) == 0 and "--resume" in options:
        arguments.append("--resume")
    names = sorted(set(options) - {"", "--output"})
    for name in draw(st.lists(st.sampled_from(names), max_size=4)):
        arguments += draw(_option(name, options[name]))
    if draw(st.integers(0, 19)) == 0:
        others = ["--nonsense", "extra", "--", "--help", "--version", ""]
        arguments.append(draw(st.sampled_from(others)))
    return arguments


@st.composite
def _option(draw: Any, name: str, action: argparse.Action) -> list[str]:
    if action.nargs == 0:
        return [name]
    values = {int: INTEGERS, float: FLOATS}.get(action.type) or (  # type: ignore[call-overload]
        PATHS if action.metavar in ("PATH", "FILE", "DIR", "XML") else TEXT
    )
    if action.choices and draw(st.integers(0, 3)):
        values = list(action.choices)
    if action.nargs == "+":
        if values is FLOATS and draw(st.booleans()):
            return [name, *draw(st.sampled_from(LADDERS)).split()]
        return [name, *draw(st.lists(st.sampled_from(values), min_size=1, max_size=3))]
    value = draw(st.sampled_from(values))
    return [f"{name}={value}"] if draw(st.booleans()) else [name, value]


class CommandLines:
    """Runs command lines among good and unusual files, of which only the output may change."""

    def __init__(self, home: Path, box: Path) -> None:
        self.home, self.box = home, box
        self._before: dict[str, str] | None = None

    def cases(self, command: str | None = None) -> st.SearchStrategy[list[str]]:
        """Return a strategy for the arguments of a command, or of all."""
        return st.sampled_from([command] if command else COMMANDS).flatmap(lines)

    def _fill(self) -> None:
        shutil.rmtree(self.box, ignore_errors=True)
        shutil.copytree(self.home, self.box)
        for name in ("empty", "directory.dcd", "linked"):
            (self.box / name).mkdir()
        for name in ("fifo", "fifo.dcd"):
            os.mkfifo(self.box / name)
        links = {"loop": "loop", "link": "linked", "dangling": "nowhere", "zero": "/dev/zero",
                 "zero.dcd": "/dev/zero"}  # fmt: skip
        for name, target in links.items():
            (self.box / name).symlink_to(target)

    def run(self, arguments: list[str]) -> Callable[[], Any]:
        """Return the function to call in a child process."""
        if self._before is None or self._snapshot() != self._before:
            self._fill()
            self._before = self._snapshot()

        def call() -> Any:
            os.chdir(self.box)
            with without_work():
                return corpus.main([*arguments])

        return call

    def verdict(self, arguments: list[str], outcome: Outcome) -> str:
        """Return ``worked``, ``refused``, or ``FAILED`` with the reason."""
        assert self._before is not None
        after = self._snapshot()
        outputs = self._outputs(arguments)
        for name in sorted(self._before.keys() | after.keys()):
            if self._before.get(name) == after.get(name):
                continue
            new = name not in self._before
            inside = any(
                f"{name}/".startswith(f"{output}/")
                or (new and output.startswith(f"{name}/"))  # a new parent folder
                for output in outputs
            )
            foreign = name.startswith("foreign")
            if not inside or (foreign and not (new and name.startswith("foreign/new"))):
                return f"FAILED: {name} was changed"
        printed = outcome.stderr.splitlines()
        if outcome.status == 2 and any(line.startswith("usage: ") for line in printed):
            errors = [line for line in printed if ": error: " in line]
            return "refused" if len(errors) == 1 else f"FAILED: {outcome.stderr}"
        names = [a.strip("/") for a in arguments[1:] if not a.startswith("-")]
        names += [a.partition("=")[2] for a in arguments]
        return judge(outcome, True, [n for n in names if len(n) > 1])

    def _outputs(self, arguments: list[str]) -> list[str]:
        """Return the output directory relative to the box, if it is inside."""
        outputs = []
        for before, argument in pairwise(arguments):
            value = argument.removeprefix("--output=")
            positional = arguments[0] == "analyze" and not argument.startswith("-")
            if not (before == "--output" or value != argument or positional) or "\x00" in value:
                continue
            try:
                path = Path(os.path.realpath(self.box / value))
            except OSError:
                continue
            if path == self.box:
                outputs += [entry.name for entry in self.box.iterdir()]
            elif path.is_relative_to(self.box):
                outputs.append(str(path.relative_to(self.box)))
        return outputs

    def _snapshot(self) -> dict[str, str]:
        snapshot: dict[str, str] = {}
        for root, folders, files in os.walk(self.box):
            for name in (*folders, *files):
                path = os.path.join(root, name)
                relative = os.path.relpath(path, self.box)
                if os.path.islink(path):
                    snapshot[relative] = "-> " + os.readlink(path)
                elif os.path.isfile(path):
                    with open(path, "rb") as file:
                        snapshot[relative] = hashlib.sha1(file.read()).hexdigest()
                else:
                    snapshot[relative] = "folder" if os.path.isdir(path) else "special"
        return snapshot


@contextmanager
def without_work() -> Iterator[None]:
    """Check everything, but leave out the computations."""

    def shipped(cls: type, molecule: Any, *, stride: int = 1) -> Any:
        check_int(stride, "stride")
        data = corpus.frames()
        return replace(data, molecule=molecule) if molecule is not corpus.molecule() else data

    def step(self: Any, *args: Any) -> None:
        self.step = self.settings.n_steps

    def tune(self: Any, n_iterations: int = 200, **options: Any) -> Any:
        check_int(n_iterations, "n_iterations", least=0)
        return {}

    def advance(self: Any, interrupt: Any) -> None:
        self.step += 0

    def open_potential(molecule: Any, platform: Any, *rest: Any, **options: Any) -> Any:
        return molecule.potential(platform=platform or "Reference", n_contexts=1)

    tiny = {
        name: replace(
            settings, flow=corpus.TINY.flow, fit=replace(corpus.FIT, n_steps=settings.fit.n_steps),
            refit=corpus.TINY.refit, n_rounds=0,
            sampling=replace(settings.sampling, n_walkers=2),
            md=replace(MDSettings(), n_frames=2),
        )
        for name, settings in PRESETS.items()
    }  # fmt: skip
    with (
        cut_short(),
        mock.patch.object(MDDataset, "shipped", classmethod(shipped)),
        mock.patch.object(Trainer, "train_step", step),
        mock.patch.object(ParallelTempering, "tune", tune),
        mock.patch("openmm_tsf.workflow.md_simulation.MDSimulation.advance", advance),
        mock.patch("openmm_tsf.workflow.md.fastest_platform", return_value="Reference"),
        mock.patch.object(openmm.LocalEnergyMinimizer, "minimize"),
        mock.patch("openmm_tsf.workflow.potential_choice.open_potential", open_potential),
        mock.patch.dict(PRESETS, tiny),
    ):
        yield
