"""The isomers of Ag6: which is which, their copies, exact jumps, and the script in a short form."""

import json
import math
import sys

import pytest
import torch

from openmm_tsf.potentials import SilverCluster
from openmm_tsf.potentials.toy import ModelPotential
from openmm_tsf.sampling.kernels import WalkerState
from tests.support.examples import EXAMPLES, load_example


@pytest.fixture(scope="module")
def isomers():
    return load_example("lecture/silver_isomers.py")


@pytest.fixture(scope="module")
def minima():
    """The octahedron and the bipyramid [2, 6, 3], nm, by ASE."""
    path = EXAMPLES.parent / "tests" / "support" / "silver_ase.json"
    found = json.loads(path.read_text())["isomers"]
    positions = [found[name]["positions"] for name in ("octahedron", "bipyramid")]
    return torch.tensor(positions, dtype=torch.float64) / 10


def generator(seed=1):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=1):
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64)


def relabelled(x, seed=2):
    """Return x [B, 6, 3] with random labels, turned, moved and every other one inverted."""
    order = torch.rand(len(x), 6, generator=generator(seed)).argsort(dim=1)
    rotation = torch.linalg.qr(normal(len(x), 3, 3, seed=seed))[0]
    sign = torch.where(torch.arange(len(x)) % 2 == 0, 1.0, -1.0)[:, None, None]
    x = x.gather(1, order[..., None].expand_as(x))
    return sign.double() * x @ rotation + normal(len(x), 1, 3, seed=seed + 1)


def test_isomers_are_known_whatever_the_labels(isomers, minima):
    x = minima.repeat_interleave(100, dim=0) + 0.012 * normal(200, 6, 3)
    kinds = isomers.classify(relabelled(x))
    assert torch.equal(kinds, torch.arange(2).repeat_interleave(100))
    # 6 choices of 3 disjoint pairs, 15; paths of three: 6 · 5 · 4 · 3 / 2 = 180; of 455.
    counts = torch.bincount(isomers.COUNTS.long())
    assert (counts[48], counts[4]) == (15, 180)
    assert math.comb(15, 3) == 455
    triangle = minima[:1].clone()
    triangle[:, :3] = 1.0 * torch.eye(3)  # three atoms far from each other
    triangle[:, 3:] = 1.0 / 3.0 + 0.01 * torch.eye(3)
    assert isomers.classify(triangle) == isomers.NEITHER


def test_isomers_are_those_of_the_nearest_minimum(isomers, minima):
    """Of displaced configurations, by sorted distances and energies of what they relax to."""
    silver = SilverCluster(6)
    x = minima.repeat_interleave(24, dim=0) + 0.015 * normal(48, 6, 3, seed=5)
    kinds = isomers.classify(x)
    relaxed = isomers.minimise(silver, x, 250)
    energies = silver.energy(relaxed)
    expected = silver.energy(minima)[kinds]
    torch.testing.assert_close(energies, expected, rtol=0, atol=0.1)  # they differ by 11.8
    distances = silver.distances(relaxed).sort(dim=1).values
    of_kind = silver.distances(minima).sort(dim=1).values[kinds]
    torch.testing.assert_close(distances, of_kind, rtol=0, atol=3e-3)


def test_copies(isomers, minima):
    x = relabelled(minima.repeat_interleave(400, dim=0) + 0.01 * normal(800, 6, 3))
    y, inverse, log_count = isomers.draw_copies(x, generator())
    assert isomers.is_learnt_copy(y).all()
    torch.testing.assert_close(inverse(y), x)
    torch.testing.assert_close(
        log_count.exp(), torch.tensor([48.0, 4.0]).double().repeat_interleave(400)
    )
    layer = isomers.internal_coordinates(y)
    u, log_det = layer.inverse_and_log_det(y)
    assert (log_det == 0).all()
    torch.testing.assert_close(layer.place(u, like=y), y)
    # All copies of one configuration are drawn, equally often, and are different points.
    for one, number in ((x[:1], 48), (x[-1:], 4)):
        n = 100 * number
        copies, _, _ = isomers.draw_copies(one.expand(n, -1, -1), generator())
        u, _ = layer.inverse_and_log_det(copies)
        _, counts = (u * 1e6).round().long().unique(dim=0, return_counts=True)
        assert len(counts) == number
        assert (counts - 100.0).square().sum() / 100.0 < number + 5 * math.sqrt(2 * number)


class Cloud(ModelPotential):
    """Atoms bound to their centroid by springs, drawn exactly.

    Octahedra are rare among them, and get an energy that makes them as likely as bipyramids.
    """

    def __init__(self, isomers, n=400_000):
        super().__init__(6, 3)
        x = normal(n, 6, 3, seed=11)
        x, self.classify = x - x.mean(dim=1, keepdim=True), isomers.classify
        kinds = self.classify(x)
        octahedra, bipyramids = x[kinds == 0], x[kinds == 1]
        self.n_octahedra, self.bias = len(octahedra), math.log(len(bipyramids) / len(octahedra))
        octahedra = octahedra.repeat(3000 // len(octahedra), 1, 1)
        self.samples = torch.cat([octahedra, bipyramids[: len(octahedra)]])

    def formula(self, x):
        springs = 0.5 * (x - x.mean(dim=1, keepdim=True)).square().sum(dim=(1, 2))
        return springs - self.bias * (self.classify(x) == 0)


def z_of_jumps(potential, kernel, n_jumps=4):
    """Return z of the net number of changes of the isomer, of ⟨U⟩ and of ⟨|x_0 - centroid|²⟩."""
    x = potential.samples
    n, random, changes = len(x), generator(12), 0
    energy = potential.energy(x)[:, None]
    state = WalkerState(x[:, None], None, energy, torch.zeros(n, 1, dtype=torch.int64))
    for _ in range(n_jumps):
        before = state
        state, _ = kernel(state, random)
        kinds = [potential.classify(each.x[:, 0]) for each in (before, state)]
        changes += int((kinds[0] != kinds[1]).sum())
    after = state.x[:, 0]
    torch.testing.assert_close(state.energy[:, 0], potential.energy(after))
    net = int((potential.classify(after) == 0).sum()) - n // 2
    # The second term is of the bias, by the number of octahedra that were drawn.
    zs = [net / (changes + changes**2 / potential.n_octahedra) ** 0.5]
    radius = [(y - y.mean(dim=1, keepdim=True))[:, 0].square().sum(dim=1) for y in (x, after)]
    for old, new in ((energy[:, 0], state.energy[:, 0]), radius):
        zs.append(float((new - old).mean() / ((new - old).std() / n**0.5)))
    return zs, changes


def test_jumps_are_exact_and_mutants_are_not(isomers, monkeypatch):
    potential = Cloud(isomers)
    copies, _, _ = isomers.draw_copies(potential.samples, generator())
    flow = isomers.new_flow(copies, 1.0, seed=1)
    optimiser = torch.optim.Adam(flow.parameters(), lr=3e-3)
    for _ in range(2):
        order = torch.randperm(len(copies), generator=generator(2))
        copies, _, _ = isomers.draw_copies(copies[order], generator(3))
        isomers.train(flow, copies, optimiser)
    kernel = isomers.IsomerJump(flow, potential, 1.0)
    zs, changes = z_of_jumps(potential, kernel)
    assert changes > 100
    assert all(abs(z) < 4 for z in zs), zs
    # Without the numbers of copies, 48 and 4.
    monkeypatch.setattr(isomers, "COUNTS", (isomers.COUNTS > 0).double())
    zs, _ = z_of_jumps(potential, kernel)
    assert abs(zs[0]) > 6


def test_script(isomers, tmp_path, monkeypatch):
    script = load_example("lecture/silver.py")
    monkeypatch.setattr(script, "WARM_UP", 10)
    arguments = ["script", "--output", str(tmp_path), "--starts", "96", "--walkers", "24"]
    monkeypatch.setattr(sys, "argv", [*arguments, "--adaptation", "40", "--iterations", "20"])
    script.main()
    made = json.loads((tmp_path / "silver.json").read_text())
    shipped = json.loads((EXAMPLES / "results" / "lecture" / "silver.json").read_text())
    for content in (made, shipped):
        energies = [content["isomers"][name]["energy_eV"] for name in isomers.NAMES]
        assert energies == pytest.approx([4.219497, 4.341772], abs=1e-5)
        assert content["saddle_eV"] == pytest.approx(4.387883, abs=1e-5)
        assert content["harmonic_delta_f_kT"] == pytest.approx(2.404, abs=0.01)
        assert content["round_trip_nm"] < 1e-6
    assert made["frozen_flow"]["changes"] > made["dynamics_alone"]["changes"]
    history = made["while_adapting"]["history"]["acceptance"]
    assert history[10] is None
    assert sum(history[-10:]) > 0
    # Of the full run: free energies agree, also with the harmonic one, in which 12, the ratio of
    # the numbers of copies, is 2.5 kT.
    assert abs(shipped["z"]) < 4
    assert abs(shipped["frozen_flow"]["delta_f_kT"][0] - 2.404) < 0.4
    assert (tmp_path / "silver.png").exists()
