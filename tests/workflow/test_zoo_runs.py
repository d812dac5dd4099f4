"""Every molecule of the zoo from its System to a finished run."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import openmm_tsf as tsf
from openmm_tsf.flows.load import load_flow
from openmm_tsf.systems.slow_torsions import slow_torsions
from openmm_tsf.workflow.frames import load_trajectory
from openmm_tsf.workflow.run import run
from openmm_tsf.workflow.settings import MDSettings, SamplingSettings
from tests.support import zoo
from tests.support.torch_cases import reference_values
from tests.workflow.tiny import QUIET, SETTINGS

LADDER_K = 500.0, 550.0, 600.0


@pytest.fixture(autouse=True)
def no_plots(monkeypatch):
    """Plots take longer than all else, and do not depend on the molecule."""
    module = "openmm_tsf.analysis.analyze"
    monkeypatch.setattr(tsf.Run, "plot", lambda self, path, reference=None: None)
    monkeypatch.setattr(f"{module}.plot_diagnostics", lambda run, path: None)
    monkeypatch.setattr(f"{module}.plot_torsions", lambda run, path, names: None)
    monkeypatch.setattr(f"{module}.plot_observables", lambda run, path: None)
    monkeypatch.setattr(f"{module}.write_thermodynamics", lambda run, folder, reference: {})


def settings(n_atoms: int):
    """Return settings with few frames, but more than there are coordinates."""
    interval = 20 if n_atoms < 19 else 3  # the implicit solvent of peptides is slow
    md = MDSettings(
        n_frames=60 + 4 * n_atoms, steps_per_frame=interval, n_equilibration_steps=20 * interval
    )
    sampling = SamplingSettings(
        temperatures=LADDER_K, n_walkers=4, n_iterations=6, n_tuning=2, n_walk=1, local_interval=6
    )
    return replace(SETTINGS, md=md, n_rounds=0, sampling=sampling)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*zoo.SMALL, *zoo.PEPTIDES])
def test_from_system_to_finished_run(name, tmp_path):
    specimen = zoo.specimen(name)
    molecule = specimen.molecule()
    folder = tmp_path / "run"
    summary = run(folder, settings(molecule.n_atoms), molecule=molecule, options=QUIET)
    result = tsf.load_run(folder)
    assert summary["n_samples_per_rung"] == 24
    assert summary["monitor"]["frames_checked"] == {f"{t:.2f}": 24 for t in LADDER_K}
    assert summary["monitor"]["wrong_handedness"]["centres"] == []
    assert result.dihedral_atoms.keys() == slow_torsions(molecule.topology).keys()
    assert result.dihedral_atoms.keys() >= set(specimen.dihedrals.split())
    assert result.topology.n_bonds == specimen.topology.getNumBonds()
    layer = load_flow(folder / "flow.pt", molecule).coordinates
    frames = [load_trajectory(folder / "md", molecule).positions]
    for temperature in LADDER_K:
        positions = result.trajectory(temperature).xyz.astype(np.float64)
        frames.append(torch.from_numpy(positions))
        energies, _ = reference_values(specimen.system, frames[-1])
        recorded = result.energies(temperature).ravel()
        # Frames are in single precision, 1e-8 nm.
        np.testing.assert_allclose(energies.numpy(), recorded, rtol=0, atol=0.02)
    x = torch.cat(frames)
    assert not zoo.has_inverted_centre(x.numpy(), specimen).any()
    assert not layer.is_mirror_image(x).any()
    u, log_det = layer.inverse_and_log_det(x)
    assert log_det.isfinite().all()
    torch.testing.assert_close(layer.place(u, like=x), x, rtol=0, atol=1e-9)
