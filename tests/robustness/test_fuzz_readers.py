"""Every file that the program reads, damaged at random: refused in words, never worse.

``tests/robustness/fuzz.py`` tries as many as there is time for, with the same strategies.
"""

import pytest
from hypothesis import HealthCheck, Phase, given, settings

from tests.robustness import readers
from tests.robustness.sandbox import isolated

LIMITS = settings(
    deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck),
    phases=[Phase.explicit, Phase.generate],
)  # fmt: skip


def check(files, n_examples, reader=None):
    @settings(LIMITS, max_examples=n_examples)
    @given(files.cases(reader))
    def test(case):
        verdict = files.verdict(case, isolated(files.run(case)))
        assert not verdict.startswith("FAILED"), f"{case!r}: {verdict}"

    test()


@pytest.fixture
def files(good, tmp_path):
    return readers.Corpus(good, tmp_path / "box")


def test_undamaged_files_are_read(files):
    """Else everything would be refused for another reason."""
    for folder, file, reader in dict((case[2], case) for case in readers.ALL).values():
        damage = readers.Damage("none", files.files[f"{folder}/{file}"])
        case = readers.Case(folder, file, reader, damage)
        outcome = isolated(files.run(case))
        assert files.verdict(case, outcome) == "worked", (case, outcome)


def test_damaged_files(files):
    check(files, 40)


@pytest.mark.slow
@pytest.mark.parametrize("reader", dict.fromkeys(case[2] for case in readers.ALL))
def test_many_damaged_files(files, reader):
    check(files, 400, reader)


@pytest.mark.parametrize(
    ("file", "reader"),
    [("T500.00K.dcd", "analyze"), ("flow.pt", "analyze"), ("config.json", "load_run"),
     ("segments/segment_000000.npz", "load_run"), ("topology.pdb", "load_run"),
     ("checkpoint.pt", "sample --resume")],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["fifo", "directory"])
def test_what_is_no_file_is_named(files, file, reader, kind):
    case = readers.Case("sample", file, reader, readers.Damage(kind, no_file=kind))
    outcome = isolated(files.run(case))
    assert files.verdict(case, outcome) == "refused", outcome
    assert file in outcome.message + outcome.stderr
