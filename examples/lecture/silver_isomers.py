"""The isomers of Ag6, which atoms may be exchanged, and jumps between isomers by a flow.

For :mod:`silver`. An isomer is known by its three longest distances, as a graph on the atoms: three
pairs without a common atom (octahedron), or a path of three (pentagonal bipyramid without a corner:
three tetrahedra about an edge). All configurations with another graph are neither.
"""

from itertools import combinations, permutations

import numpy as np
import torch

from openmm_tsf.coordinates.chirality import Chirality
from openmm_tsf.coordinates.internal import InternalCoordinates
from openmm_tsf.coordinates.whitening import Whitening
from openmm_tsf.coordinates.zmatrix import ZMatrix
from openmm_tsf.flows import RealNVPFlow
from openmm_tsf.metropolis import metropolis
from openmm_tsf.sampling.kernels import KernelInfo
from openmm_tsf.training.losses import negative_log_likelihood, whiten

PAIRS = list(combinations(range(6), 2))
OCTAHEDRON, BIPYRAMID, NEITHER = 0, 1, 2
NAMES = ("octahedron", "bipyramid")
#: The longest distances of the labelled copy of each isomer that the flow learns. Atoms 0 to 3 are
#: a ring, closed in one isomer and open between 0 and 3 in the other; 4 and 5 are its two sides.
LONGEST = (((0, 2), (1, 3), (4, 5)), ((0, 2), (1, 3), (0, 3)))


def _code(edges):
    """Return a number for a set of pairs."""
    return sum(1 << PAIRS.index(tuple(sorted(edge))) for edge in edges)


def _tables():
    """Return the isomer of each code [2^15], the relabellings that lead to its copy, their number.

    Relabelling y_k = x_p(k) has the longest distances of the copy if p maps them to those of x.
    """
    orders = {}
    for isomer, longest in enumerate(LONGEST):
        for order in permutations(range(6)):
            code = _code([(order[i], order[j]) for i, j in longest])
            orders.setdefault(code, (isomer, []))[1].append(order)
    isomers = torch.full((1 << len(PAIRS),), NEITHER)
    table, counts = torch.zeros(len(isomers), 48, 6, dtype=torch.int64), torch.zeros(len(isomers))
    for code, (isomer, found) in orders.items():
        isomers[code], counts[code] = isomer, len(found)
        table[code, : len(found)] = torch.tensor(found)
    return isomers, table, counts.double()


ISOMERS, ORDERS, COUNTS = _tables()


def codes(x):
    """Return the codes [B] of the three longest distances of x [B, 6, 3]."""
    i, j = torch.tensor(PAIRS).T
    distances = (x[:, i] - x[:, j]).norm(dim=2)
    return (1 << distances.topk(3, dim=1).indices).sum(dim=1)


def classify(x):
    """Return the isomers [B] of x [B, 6, 3], int64."""
    return ISOMERS[codes(x)]


def handedness(y):
    """Return the volume [B] that atoms 4, 5, 1 and 2 span, positive in the copy that is learnt."""
    a, b, c = y[:, 4] - y[:, 5], y[:, 1] - y[:, 5], y[:, 2] - y[:, 5]
    return (a * torch.linalg.cross(b, c)).sum(dim=1)


def is_learnt_copy(y):
    """Return which y [B, 6, 3] have the labels and the handedness that the flow learns."""
    wanted = torch.tensor([_code(edges) for edges in LONGEST])
    return torch.isin(codes(y), wanted) & (handedness(y) > 0)


def draw_copies(x, generator):
    """Draw one of the copies of x [B, 6, 3] that the flow learns, all equally likely.

    An octahedron has 48 (relabelled, and inverted where that gives the right handedness), a
    bipyramid 4, anything else none.

    Returns
    -------
    y : Tensor
        [B, 6, 3], the copies; x itself where there are none.
    inverse : callable
        Gives configurations [B, 6, 3] the labels and the handedness that x had.
    log_count : Tensor
        [B], the ln of the number of copies, -inf where there are none.
    """
    code = codes(x)
    count = COUNTS[code]
    uniform = torch.rand(len(x), generator=generator, dtype=torch.float64)
    order = ORDERS[code, (uniform * count).long()]
    order = torch.where(count[:, None] > 0, order, torch.arange(6))
    y = x.gather(1, order[..., None].expand_as(x))
    sign = torch.where(handedness(y) > 0, 1.0, -1.0).to(x)[:, None, None]
    back = order.argsort(dim=1)[..., None].expand_as(x)
    return sign * y, lambda z: sign * z.gather(1, back), count.log()


def internal_coordinates(examples):
    """Return 12 internal coordinates for learnt copies, cut where `examples` [B, 6, 3] are not."""
    rows = [
        (4, -1, -1, -1),
        (1, 4, -1, -1),
        (2, 1, 4, -1),
        (5, 1, 4, 2),
        (0, 1, 4, 2),
        (3, 2, 1, 4),
    ]
    siblings = np.array([False, False, False, True, True, False])
    none, names = np.zeros(6, dtype=bool), tuple(f"Ag{i}" for i in range(6))
    levels = np.array([0, 0, 0, 1, 1, 1])
    zmatrix = ZMatrix(np.array(rows), siblings, none, none, levels, names)
    centres = Chirality(torch.zeros(0, 5, dtype=torch.int64), torch.zeros(0, 4).double())
    zeros = torch.zeros(3).double()
    layer = InternalCoordinates(zmatrix, zeros, torch.full((5,), 0.27), zeros, centres)
    layer.fit_branch_cuts(layer.bonds_angles_torsions(examples)[2])
    return layer


def minimise(potential, x, n_steps=400):
    """Return what gradient steps downhill from x [B, 6, 3] lead to, each row with its own step."""
    energy, force = potential.energy_and_forces(x)
    step = torch.full((len(x), 1, 1), 1e-6, dtype=x.dtype)
    for _ in range(n_steps):
        move = step * force
        longest = move.norm(dim=2).amax(dim=1)[:, None, None]
        trial = x + move * (0.01 / longest).clamp(max=1.0)
        trial_energy, trial_force = potential.energy_and_forces(trial)
        down = (trial_energy <= energy)[:, None, None]
        x, force = torch.where(down, trial, x), torch.where(down, trial_force, force)
        energy = torch.where(down[:, 0, 0], trial_energy, energy)
        step = step * torch.where(down, 1.3, 0.4)
    return x


def curvatures(potential, x):
    """Return the second derivatives [18, 18] of U at x [6, 3], kJ/mol/nm²."""
    hessian = torch.autograd.functional.hessian(lambda z: potential.energy(z[None]).sum(), x)
    return hessian.reshape(18, 18)


def stationary_point(potential, x, n_steps=30):
    """Return the stationary point [6, 3] that Newton's steps lead to from x [6, 3]."""
    for _ in range(n_steps):
        force = potential.energy_and_forces(x[None])[1].flatten()
        step = torch.linalg.pinv(curvatures(potential, x), rtol=1e-6, hermitian=True) @ force
        x = x + (step * (0.02 / step.norm()).clamp(max=1.0)).reshape(6, 3)
    return x


def saddle_between(potential, minima):
    """Return the saddle point [6, 3] between the learnt copies of two isomers [2, 6, 3].

    Newton's steps start in the middle of a line in internal coordinates.
    """
    copies, _, _ = draw_copies(minima, torch.Generator().manual_seed(0))
    layer = internal_coordinates(copies)
    u, _ = layer.inverse_and_log_det(copies)
    middle, _ = layer.forward_and_log_det(u.mean(dim=0, keepdim=True))
    saddle = stationary_point(potential, middle[0])
    if int((torch.linalg.eigvalsh(curvatures(potential, saddle)) < -1e-3).sum()) != 1:
        raise RuntimeError(
            "Newton's steps from the middle between the isomers find no saddle point"
        )
    return saddle


def harmonic_log_ratio(potential, x, kt):
    """Return ln of the bipyramid's population over the octahedron's in harmonic approximation.

    x [2, 6, 3] are their minima. Each has 2 · 6! / h labelled copies, h = 48 and 4 the orders of
    their point groups; a copy weighs exp(-E/kT) |I|^(1/2) / |H|^(1/2), I the tensor of inertia and
    H the second derivatives without the six rigid motions.
    """
    logs = []
    for minimum, energy, order in zip(x, potential.energy(x), (48.0, 4.0), strict=True):
        arms = minimum - minimum.mean(dim=0)
        inertia = arms.square().sum() * torch.eye(3, dtype=x.dtype) - arms.T @ arms
        stiff = torch.linalg.eigvalsh(curvatures(potential, minimum))[6:]
        logs.append(-energy / kt + 0.5 * (inertia.logdet() - stiff.log().sum()) - np.log(order))
    return float(logs[BIPYRAMID] - logs[OCTAHEDRON])


class IsomerJump:
    """A kernel: a draw from the flow, with the labels and the handedness of the present copy.

    One of the copies of x that the flow learns is drawn, y; the flow proposes another one, y',
    which gets the pose of y, and the labels of x. Draws that are no learnt copies are rejected.
    log alpha = Δ[-U/kT - ln q(y) - ln(number of copies of x)]: exact for labelled configurations.
    """

    name, exact = "jump", True

    def __init__(self, flow, potential, temperature):
        self.flow, self.potential, self.temperatures = flow, potential, (temperature,)
        self.kt, self.counts_shape = potential.boltzmann_constant * temperature, (1,)

    @torch.no_grad()
    def __call__(self, state, generator):
        x, energy, kelvin = state.x[:, 0], state.energy[:, 0], self.temperatures[0]
        y, inverse, log_count = draw_copies(x, generator)
        v, log_det = self.flow.inverse_and_log_det(y, x.new_zeros(len(x), 0))
        log_q = self.flow.prior_log_prob(v, kelvin) + log_det
        may_move = torch.isfinite(log_count) & torch.isfinite(log_det)
        latents = self.flow.sample_prior(len(x), kelvin, generator)
        (new, _), new_log_det = self.flow.forward_and_log_det(latents)
        new_log_q = self.flow.prior_log_prob(latents, kelvin) - new_log_det
        inside = torch.isfinite(new_log_det) & new.isfinite().all(dim=2).all(dim=1)
        inside &= is_learnt_copy(new) & may_move
        new = inverse(self.flow.match_pose(torch.where(inside[:, None, None], new, y), like=y))
        new_energy = torch.full_like(energy, torch.inf)
        new_energy[inside] = self.potential.energy(new[inside])
        current = -energy / self.kt - log_q - log_count
        proposed = -new_energy / self.kt - new_log_q - COUNTS[codes(new)].log()
        accepted, _ = metropolis(
            torch.where(may_move, current, 0.0),
            torch.where(inside, proposed, -torch.inf),
            generator,
        )
        x = torch.where(accepted[:, None, None], new, x)
        energy = torch.where(accepted, new_energy, energy)
        counts = accepted.sum()[None], torch.tensor([len(x)])
        info = KernelInfo(*counts, n_evaluations=int(inside.sum()))
        return state.evolve(x=x[:, None], energy=energy[:, None]), info

    @torch.no_grad()
    def round_trip_error(self, state, generator):
        """Return the largest deviation of D(D^-1(y)) from copies y of the walkers, nm."""
        y, _, _ = draw_copies(state.x[:, 0], generator)
        v, log_det = self.flow.inverse_and_log_det(y, y.new_zeros(len(y), 0))
        y, v = y[log_det.isfinite()], v[log_det.isfinite()]
        (back, _), _ = self.flow.forward_and_log_det(v)
        return float((self.flow.match_pose(back, like=y) - y).abs().max())


def new_flow(copies, temperature, seed):
    """Return an untrained RealNVP for learnt copies [B, 6, 3] of frames at a temperature, K."""
    layer = internal_coordinates(copies)
    u, _ = layer.inverse_and_log_det(copies)
    whitening = Whitening.fit(u, layer.kinds, mode="full")
    return RealNVPFlow(12, 0, 6, (64, 64), temperature, layer, whitening, seed=seed)


def train(flow, copies, optimiser, batch=256):
    """Take a step of maximum likelihood on each batch of copies [B, 6, 3]; return the mean loss."""
    losses = []
    for part in copies.split(batch):
        y, log_det = whiten(flow, part)
        inside = torch.isfinite(log_det)
        y, log_det = y[inside], log_det[inside]
        loss = negative_log_likelihood(
            flow.network, y, log_det, y[:, :0], y.new_ones(len(y))
        ).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    return sum(losses) / len(losses)
