"""What every potential says of conformations without a finite energy."""

import torch


def check_non_finite_rows(potential, x):
    """Check energies of x [4, *event]: the first as given, then with NaN, infinity, far too large.

    The others are +inf, have no force and are counted; the potential has computed nothing before.
    """
    x = x.clone()
    rows = x.flatten(1)  # a view
    rows[1, 1], rows[2, 0] = torch.nan, torch.inf
    rows[3] = 1e30 if x.dtype == torch.float32 else 1e200
    energies, forces = potential.energy_and_forces(x)
    assert energies.dtype == forces.dtype == x.dtype
    assert (energies == torch.inf).tolist() == [False, True, True, True]
    assert forces[0].any()
    assert not forces[1:].any()
    assert (potential.n_evaluations, potential.n_non_finite) == (4, 3)
    assert potential.energy(x[:0]).shape == (0,)
    assert potential.n_evaluations == 4
