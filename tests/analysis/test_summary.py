"""The content of ``summary.json``."""

import json

import numpy as np
import pytest

from openmm_tsf.analysis import load_run, write_summary
from openmm_tsf.units import KB
from tests.support.analysis_runs import (
    BETAS,
    GAP,
    TEMPERATURES,
    make_reference,
    run_like_reference,
    small_run,
)
from tests.support.fabricate import write_run


def test_summary(tmp_path):
    energy, phi, _ = small_run(
        tmp_path / "run",
        positions=None,
        energy_evaluations={"md": 7, "training": 8, "sampling": 9},
        wall_seconds={"md": 1.0, "training": 2.0},
    )
    run = load_run(tmp_path / "run")
    returned = write_summary(run, tmp_path / "summary.json")
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary == returned
    assert summary["temperatures_K"] == TEMPERATURES.tolist()
    assert (summary["seed"], summary["n_walkers"], summary["n_iterations"]) == (5, 4, 60)
    positive = summary["phi_positive"]["424.26"]
    assert positive["p"] == pytest.approx((phi[:, :, 1] > 0).mean())
    n_eff = positive["p"] * (1 - positive["p"]) / positive["stderr"] ** 2
    assert positive["n_eff"] == pytest.approx(n_eff)
    assert summary["energy_kJ_mol"]["600.00"]["mean"] == pytest.approx(energy[:, :, 2].mean())
    # Independent energies: about as many effective samples as there are.
    assert 60 < summary["energy_kJ_mol"]["600.00"]["n_eff"] <= 241
    assert positive["r_hat"] == pytest.approx(run.r_hat("phi", 424.26))
    assert 0.9 < summary["energy_kJ_mol"]["300.00"]["r_hat"] < 1.2
    capacity = summary["heat_capacity_kJ_mol_K"]["300.00"]
    assert capacity["value"] == pytest.approx(energy[:, :, 0].var() / (KB * 300**2))
    assert summary["replica_relaxation"] == {"second_eigenvalue": 1.0, "iterations": None}
    for check in summary["ensemble_check"].values():
        assert check.keys() == {"300.00-424.26", "424.26-600.00"}
        assert all(abs(pair["z"]) < 4 for pair in check.values())
    delta = summary["delta_F_phi_kT"]["300.00"]
    assert abs(delta["mbar_value"] - GAP * BETAS[0]) < 4 * delta["mbar_stderr"]
    assert summary["acceptance"]["local"] == {"300.00": 0.2, "424.26": 0.2, "600.00": 0.2}
    assert summary["acceptance"]["swap_plain"] == [0.4, 0.4]
    assert summary["acceptance"]["swap_steered"] == []
    assert summary["energy_evaluations"] == {"md": 7, "training": 8, "sampling": 6009}
    assert summary["wall_seconds"] == {"md": 1.0, "training": 2.0, "sampling": 1.5}
    assert (summary["rejected_non_finite"], summary["mirror_images"]) == (3, 6)
    assert summary["versions"] == {"numpy": np.__version__}
    per_million = summary["phi_positive"]["300.00"]["n_eff"] / 6000e-6
    efficiency = summary["efficiency"]["n_eff_phi_per_million_evaluations"]
    assert efficiency == pytest.approx(per_million)


def test_summary_has_the_users_seed(tmp_path):
    small_run(tmp_path / "run", n=3, positions=None, choices={"seed": 1})
    assert load_run(tmp_path / "run").summary()["seed"] == 1


def test_summary_with_a_reference_and_recorded_costs(tmp_path):
    rng = np.random.default_rng(17)
    costs = {"md": 3, "sampling": 1}
    run = run_like_reference(rng, tmp_path / "run", energy_evaluations=costs)
    summary = write_summary(run, tmp_path / "summary.json", make_reference(rng, n=300))
    assert summary["comparison"]["phi_positive"]["z"].keys() == {"300.00", "424.26", "600.00"}
    assert summary["energy_evaluations"] == {"md": 3, "training": None, "sampling": 30001}
    assert "comparison" not in run.summary()


def test_summary_without_phi(tmp_path):
    energy = np.random.default_rng(16).normal(size=(30, 2, 2))
    toy = write_run(tmp_path / "toy", [0.5, 1.0], energy, boltzmann_constant=1.0)
    summary = load_run(toy).summary()
    assert "phi_positive" not in summary
    assert summary["dihedral_positive"] == {}
    chi = load_run(write_run(tmp_path / "chi", [300, 400], energy, {"chi1": energy - 0.5}))
    assert chi.summary()["dihedral_positive"] == {}  # of backbones: chi has basins instead


@pytest.mark.parametrize(("n", "n_walkers"), [(1, 1), (1, 3), (2, 1), (3, 2)])
def test_very_short_runs_do_not_fail(tmp_path, n, n_walkers):
    small_run(tmp_path / "run", n=n, n_walkers=n_walkers)
    json.dumps(load_run(tmp_path / "run").summary(), allow_nan=False)
