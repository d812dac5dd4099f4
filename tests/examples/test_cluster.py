"""The Slurm scripts: their syntax, their options, and what they do, with a pretended Slurm."""

import os
import re
import shlex
import subprocess
import sys

import pytest

from openmm_tsf.cli.arguments import build_parser
from openmm_tsf.io.files import read_json
from tests.support.examples import EXAMPLES

FOLDER = EXAMPLES / "cluster"
SCRIPTS = sorted(FOLDER.glob("*.sh"))
#: Starts its command as often as the job has tasks, as srun does.
SRUN = """
import os, subprocess, sys
n = int(os.environ.get("SLURM_NTASKS", "1"))
tasks = []
for rank in range(n):
    numbers = {"SLURM_PROCID": rank, "SLURM_LOCALID": rank, "SLURM_STEP_NUM_TASKS": n}
    numbers |= {"SLURM_STEP_NODELIST": "localhost", "SLURM_STEP_ID": 0}
    environment = os.environ | {name: str(value) for name, value in numbers.items()}
    tasks.append(subprocess.Popen(sys.argv[1:], env=environment))
sys.exit(max(task.wait() for task in tasks))
"""
#: Notes how it was called, and ends with the status that the test asks for.
NOTE = """
import os, sys
with open(os.environ["CALLS"], "a") as calls:
    print(NAME, *sys.argv[1:], file=calls)
sys.exit(int(os.environ.get("STATUS", "0")) if NAME != "scontrol" else 0)
"""
PROGRAM = "import sys; from openmm_tsf.cli.main import main; sys.exit(main())"
SHORT = (
    "--preset quick --steps 4 --rounds 0 --stride 40 --walkers 8 --iterations 4 --tuning 2 "
    "--temperatures 500 600 --platform Reference --quiet"
)


@pytest.fixture
def slurm(tmp_path):
    """A function that runs a script as a job, and returns its status and the calls it made."""
    folder = tmp_path / "bin"
    folder.mkdir()

    def install(name, source):
        program = folder / name
        program.write_text(f"#!{sys.executable}\nNAME = {name!r}\n{source}")
        program.chmod(0o755)

    def run_job(script, *arguments, program=NOTE, seconds=300, **variables):
        install("srun", SRUN)
        install("scontrol", NOTE)
        install("openmm-tsf", program)
        if program is NOTE:
            install("torchrun", NOTE)
        else:
            install("torchrun", "from torch.distributed.run import main\nmain()")
        calls = tmp_path / "calls"
        calls.write_text("")
        job = {"SLURM_JOB_ID": str(1000 + os.getpid() % 9000), "CALLS": str(calls)}
        path = f"{folder}:{os.environ['PATH']}"
        python = f"{EXAMPLES.parent}:{os.environ.get('PYTHONPATH', '')}"
        done = subprocess.run(
            ["bash", str(FOLDER / script), *arguments],
            env={**os.environ, "PATH": path, "PYTHONPATH": python, **job, **variables},
            cwd=tmp_path,
            timeout=seconds,
            capture_output=True,
            text=True,
        )
        return done, calls.read_text().splitlines()

    return run_job


def test_the_page_lists_all_scripts():
    page = (FOLDER / "README.md").read_text()
    assert {path.name for path in SCRIPTS} == set(re.findall(r"`(\w+\.sh)`", page))


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_syntax(path):
    subprocess.run(["bash", "-n", path], check=True)
    assert os.access(path, os.X_OK)
    lines = path.read_text().splitlines()
    assert lines[0] == "#!/bin/bash"
    options = [i for i, line in enumerate(lines) if line.startswith("#SBATCH --")]
    first = next(i for i, line in enumerate(lines) if line and not line.startswith("#"))
    assert options
    assert max(options) < first  # Slurm reads no further


@pytest.mark.parametrize(
    ("script", "arguments", "variables"),
    [
        ("one_gpu.sh", ["run", "--walkers", "512"], {}),
        ("one_node.sh", ["run", "--walkers", "512"], {"SLURM_GPUS_ON_NODE": "8"}),
        ("prepare.sh", ["run", "64", "--walkers", "512"], {}),
        ("shard.sh", ["run"], {"SLURM_ARRAY_TASK_ID": "7"}),
        ("analyze.sh", ["run"], {}),
        ("preempted.sh", ["run", "--walkers", "512"], {"SLURM_NTASKS": "3"}),
    ],
)
def test_the_commands_of_the_scripts_parse(slurm, script, arguments, variables):
    done, calls = slurm(script, *arguments, **variables)
    assert done.returncode == 0, done.stderr
    assert len(calls) == int(variables.get("SLURM_NTASKS", "1"))
    for call in calls:
        parsed = build_parser().parse_args(shlex.split(call.partition("openmm")[2])[1:])
        assert getattr(parsed, "device", "cuda") == "cuda"
        assert getattr(parsed, "resume", True)
        if "--walkers" in arguments:
            assert parsed.walkers == 512
        if script == "shard.sh":
            assert parsed.shard == 7
        if script in ("one_node.sh", "prepare.sh", "preempted.sh"):
            shards = {"one_node.sh": 8, "prepare.sh": 64, "preempted.sh": 3}
            assert parsed.shards == shards[script]
    done, _ = slurm(script)
    assert done.returncode != 0
    assert "expected" in done.stderr


@pytest.mark.parametrize(("status", "is_requeued"), [(0, False), (130, True), (2, False)])
def test_only_a_stopped_job_is_requeued(slurm, status, is_requeued):
    variables = {"SLURM_NTASKS": "2", "STATUS": str(status), "SLURM_JOB_ID": "4321"}
    done, calls = slurm("preempted.sh", "run", **variables)
    assert done.returncode == status
    assert ("scontrol requeue 4321" in calls) == is_requeued


@pytest.mark.slow
def test_ranks_of_srun_make_a_run_together(slurm, tmp_path):
    done, _ = slurm(
        "preempted.sh", "run", *SHORT.split(), program=PROGRAM, DEVICE="cpu", SLURM_NTASKS="2"
    )
    assert done.returncode == 0, done.stderr
    config = read_json(tmp_path / "run" / "config.json")
    assert config["n_shards"] == 2
    assert config["choices"]["training_ranks"] == [2]
    assert read_json(tmp_path / "run" / "summary.json")["n_iterations"] == 4
    assert done.stdout.count("report.html") == 1  # of rank 0 only


@pytest.mark.slow
def test_an_array_makes_a_run(slurm, tmp_path):
    options = {"program": PROGRAM, "DEVICE": "cpu"}
    done, _ = slurm("prepare.sh", "run", "2", *SHORT.split(), **options)
    assert done.returncode == 0, done.stderr
    for number in ("1", "0", "0"):  # in any order; the last finds it complete
        done, _ = slurm("shard.sh", "run", SLURM_ARRAY_TASK_ID=number, **options)
        assert done.returncode == 0, done.stderr
    done, _ = slurm("analyze.sh", "run", **options)
    assert done.returncode in (0, 3, 4), done.stderr
    assert read_json(tmp_path / "run" / "summary.json")["n_iterations"] == 4


@pytest.mark.slow
def test_torchrun_makes_a_run(slurm, tmp_path):
    variables = {"DEVICE": "cpu", "SLURM_GPUS_ON_NODE": "2"}
    done, _ = slurm("one_node.sh", "run", *SHORT.split(), program=PROGRAM, **variables)
    assert done.returncode == 0, done.stderr
    assert read_json(tmp_path / "run" / "config.json")["choices"]["training_ranks"] == [2]
