"""How much of the ensemble a run's flow proposes too rarely, and its contribution to <U>.

    python examples/benchmarks/hard_to_reach.py run/

A state whose weight w = p/q is far above the mean is proposed too rarely: a short run lacks it
without a sign of it. Here w is computed at frames of the reference, which is MD without a flow: the
fraction of frames above a weight, and what they contribute to <U>. Prints a table.
"""

import argparse
import math
from pathlib import Path

import torch
from common import reference_frames

import openmm_tsf as tsf
from openmm_tsf.flows.draws import draw_weighted
from openmm_tsf.flows.load import load_flow
from openmm_tsf.flows.weights import log_weight

TEMPERATURES = (300.0, 600.0)
WEIGHTS = (3, 10, 100)


@torch.no_grad()
def log_weights(flow, potential, x, kelvin, repeats, generator):
    """ln(p/q) [repeats n] of frames x [n, N, 3] with momenta."""
    tau, kt = kelvin / flow.reference_temperature, potential.boltzmann_constant * kelvin
    reduced_energy = potential.energy(x) / kt
    parts = []
    kelvins = torch.full((len(x),), kelvin, dtype=torch.float64)
    for _ in range(repeats):
        momenta = torch.randn(len(x), flow.n_momenta, generator=generator, dtype=torch.float64)
        momenta = momenta * math.sqrt(tau)
        copies, log_partition = flow.draw_copies(x, kelvins, generator)
        v, log_det = flow.inverse_and_log_det(x, momenta, copies)
        log_q = flow.prior_log_prob(v, kelvin) + log_det - log_partition
        parts.append(log_weight(reduced_energy, momenta, tau, log_q))
    return torch.cat(parts)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="a run directory with a flow whose copies overlap")
    parser.add_argument("--draws", type=int, default=20_000)
    parser.add_argument("--repeats", type=int, default=4, help="momenta for each frame")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    molecule = tsf.systems.alanine_dipeptide()
    flow, potential = load_flow(args.run / "flow.pt", molecule), molecule.potential()
    if not flow.overlap:
        parser.error(f"{args.run}: expected a flow whose copies overlap")
    generator = torch.Generator().manual_seed(args.seed)
    for kelvin in TEMPERATURES:
        x = reference_frames(kelvin)
        x = x[~flow.is_mirror_image(x)]
        draws = draw_weighted(flow, potential, kelvin, args.draws, generator, args.draws)
        log_mean = torch.logsumexp(draws.log_weights, 0) - math.log(args.draws)
        weights = log_weights(flow, potential, x, kelvin, args.repeats, generator) - log_mean
        deviation = potential.energy(x).repeat(args.repeats)
        deviation = deviation - deviation.mean()
        for weight in WEIGHTS:
            above = weights > math.log(weight)
            print(
                f"{kelvin:g} K: w > {weight}: {float(above.double().mean()):.5f} of the frames, "
                f"{float((deviation * above).mean()):+.3f} kJ/mol of <U>"
            )


if __name__ == "__main__":
    main()
