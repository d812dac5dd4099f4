"""How much of the ensemble a run's flow can hardly reach, and what that could do to <U>.

    python examples/benchmarks/hard_to_reach.py run/

A state of weight w = p/q far above the mean is proposed too rarely: a run that is too short lacks
it, and says nothing. Here w is measured at frames of the reference, which is dynamics alone and
knows nothing of the flow: the part of them above a weight, and what they contribute to <U>. Prints
a table.
"""

import argparse
import math
from pathlib import Path

import torch
from training_trials import LADDER, reference_frames

import openmm_tsf as tsf
from openmm_tsf.flows.load import load_flow
from openmm_tsf.flows.weights import log_weight

WEIGHTS = (3, 10, 100)


@torch.no_grad()
def log_weights(flow, potential, x, kelvin, n_draws, repeats, generator):
    """ln(p/q) less ln of its mean over draws, of frames x [n, N, 3] with momenta: [repeats n]."""
    tau, kt = kelvin / flow.reference_temperature, potential.boltzmann_constant * kelvin
    drawn = flow.sample(n_draws, kelvin, generator)
    inside = torch.isfinite(drawn.log_prob)
    energy = potential.energy(drawn.x[inside])
    of_draws = log_weight(energy / kt, drawn.momenta[inside], tau, drawn.log_prob[inside])
    mean = torch.logsumexp(of_draws, 0) - math.log(n_draws)
    found = []
    kelvins = torch.full((len(x),), kelvin, dtype=torch.float64)
    for _ in range(repeats):
        momenta = torch.randn(len(x), flow.n_momenta, generator=generator, dtype=torch.float64)
        momenta = momenta * math.sqrt(tau)
        copies, log_partition = flow.draw_copies(x, kelvins, generator)
        v, log_det = flow.inverse_and_log_det(x, momenta, copies)
        log_q = flow.prior_log_prob(v, kelvin) + log_det - log_partition
        found.append(log_weight(potential.energy(x) / kt, momenta, tau, log_q) - mean)
    return torch.cat(found)


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
    frames = reference_frames()
    for rung, kelvin in enumerate(LADDER):
        x = frames[:, rung]
        x = x[~flow.is_mirror_image(x)]
        weights = log_weights(flow, potential, x, kelvin, args.draws, args.repeats, generator)
        apart = potential.energy(x).repeat(args.repeats)
        apart = apart - apart.mean()
        for weight in WEIGHTS:
            above = weights > math.log(weight)
            print(
                f"{kelvin:g} K: w > {weight}: {float(above.double().mean()):.5f} of the frames, "
                f"{float((apart * above).mean()):+.3f} kJ/mol of <U>"
            )


if __name__ == "__main__":
    main()
