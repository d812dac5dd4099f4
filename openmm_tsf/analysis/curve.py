"""Any observable as a function of temperature, by MBAR over all rungs."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from openmm_tsf.analysis.mbar import Mbar
from openmm_tsf.analysis.statistics import Array


@dataclass(frozen=True)
class Curve:
    """The mean of an observable as a function of temperature, as `Run.curve` returns it.

    Attributes
    ----------
    temperatures
        [T] in K.
    value, stderr
        [T, ...] the mean at each temperature and its standard error, which includes correlation in
        time and between rungs, and the error of the rungs' free energies (see
        `openmm_tsf.analysis.mbar`). Errors at two temperatures are those of the same samples. NaN
        where an error is not known.
    n_eff
        [T] Kish's effective sample size 1/Σw² of the weights. The cost of correlation is in the
        errors, not in here.

    Examples
    --------
    >>> import numpy as np
    >>> from openmm_tsf.analysis.curve import compute_curve
    >>> from openmm_tsf.analysis.mbar import Mbar
    >>> ladder = np.array([1.0, 2.0])  # of one harmonic mode, k_B = 1: ⟨x²⟩ = T
    >>> x = np.sqrt(ladder) * np.random.default_rng(1).normal(size=(2000, 4, 2))
    >>> curve = compute_curve(Mbar(0.5 * x**2, 1 / ladder), [1.0, 1.5], 1.0, x**2)
    >>> (abs(curve.value - [1.0, 1.5]) < 3 * curve.stderr).tolist()
    [True, True]
    """

    temperatures: Array
    value: Array
    stderr: Array
    n_eff: Array


def compute_curve(
    mbar: Mbar,
    temperatures: Sequence[float] | Array,
    boltzmann_constant: float,
    values: npt.ArrayLike,
) -> Curve:
    """Compute the mean of an observable, of which `values` [n, W, R, ...] are the samples.

    Temperatures are in K, the Boltzmann constant in the energies' unit per kelvin.
    """
    kelvins, samples = np.asarray(temperatures, dtype=np.float64), np.asarray(values)
    columns = samples.reshape(*mbar.energy.shape, -1)
    pairs, n_eff = np.empty((2, len(kelvins), columns.shape[-1])), np.empty(len(kelvins))
    for t, kelvin in enumerate(kelvins):
        weighted = mbar.reweight(1.0 / (boltzmann_constant * kelvin))
        n_eff[t] = weighted.kish
        for k in range(columns.shape[-1]):
            pairs[:, t, k] = weighted.mean(columns[..., k]).pair
    shape = (len(kelvins), *samples.shape[3:])
    return Curve(kelvins, pairs[0].reshape(shape), pairs[1].reshape(shape), n_eff)
