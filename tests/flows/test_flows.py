"""The flows: invertibility, density, steering by temperature, and files."""

import copy
import dataclasses
import math

import pytest
import torch

from openmm_tsf.flows import RealNVPFlow, TemperatureSteerableFlow
from openmm_tsf.flows.coupling import AffineCoupling, Scale
from openmm_tsf.flows.load import load_flow
from openmm_tsf.potentials import GaussianWell, PhiFourChain
from openmm_tsf.sampling.kernels import WhitenedCoordinates
from openmm_tsf.systems.dataset import MDDataset
from openmm_tsf.systems.library import alanine_dipeptide
from tests.coordinates.poses import rotation

SMALL = {"n_blocks": 2, "hidden": (16,)}


def roughen(flow, seed=3, size=0.3):
    """Random weights of order one, so that no test passes because the map is the identity."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in flow.network.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            scale = size / math.sqrt(max(1, parameter.shape[-1])) if parameter.ndim else size
            parameter.add_(scale * noise)
    return flow


@pytest.fixture(scope="module")
def dataset(molecule):
    return MDDataset.shipped(molecule, stride=40)


def rough(flow_class, **options):
    @pytest.fixture(scope="module")
    def flow(dataset):
        return roughen(flow_class.from_dataset(dataset, seed=5, **options, **SMALL))

    return flow


tsf, realnvp = rough(TemperatureSteerableFlow), rough(RealNVPFlow)
polar = rough(TemperatureSteerableFlow, metric="polar")


@pytest.fixture(scope="module")
def overlapping(dataset):
    return TemperatureSteerableFlow.from_dataset(dataset, overlap=True, **SMALL)


@pytest.fixture(scope="module")
def mixed(tsf):
    flow = copy.deepcopy(tsf)
    flow.conditioner_dtype = torch.float32
    return flow


def draw_inside(flow, n, seed=1):
    """Draws inside the domain: (v, x, momenta)."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        v = flow.sample_prior(4 * n, flow.reference_temperature, generator)
        (x, momenta), log_det = flow.forward_and_log_det(v)
    inside = torch.isfinite(log_det).nonzero()[:n, 0]
    assert len(inside) == n
    return v[inside], x[inside], momenta[inside]


@pytest.mark.parametrize("name", ["tsf", "realnvp", "polar"])
def test_round_trip_and_log_determinants(name, request):
    flow = request.getfixturevalue(name)
    v, x, momenta = draw_inside(flow, 50)
    _, forward = flow.forward_and_log_det(v)
    back, inverse = flow.inverse_and_log_det(x, momenta)
    torch.testing.assert_close(back, v, rtol=0, atol=1e-9)
    torch.testing.assert_close(inverse, -forward, rtol=0, atol=1e-8)
    (again, again_momenta), _ = flow.forward_and_log_det(back)
    assert (again - x).abs().max() < 1e-9  # nm
    torch.testing.assert_close(again_momenta, momenta, rtol=0, atol=1e-9)


def test_conditioners_of_lower_precision_leave_the_map_invertible(tsf, mixed):
    v, x, momenta = draw_inside(mixed, 2000)
    with torch.no_grad():
        back, inverse = mixed.inverse_and_log_det(x, momenta)
        (again, again_momenta), forward = mixed.forward_and_log_det(back)
        exact, _ = tsf.inverse_and_log_det(x, momenta)
    # Both directions use the same conditioner: its rounding differs only where a number lies
    # within rounding of a boundary between two float32 numbers.
    off = (again - x).abs().amax(dim=(1, 2))
    assert float((off > 1e-12).double().mean()) < 0.01
    assert float(off.max()) < 1e-6  # nm
    assert float((again_momenta - momenta).abs().max()) < 1e-5
    torch.testing.assert_close(inverse, -forward, rtol=0, atol=1e-12)
    # The map differs slightly from that in float64.
    assert 1e-9 < float((back - exact).abs().max()) < 1e-4
    assert float((back - v).abs().max()) < 1e-4


def test_conditioners_of_lower_precision_leave_the_jacobian_constant(mixed):
    assert mixed.is_constant_log_det
    # Autograd rounds the gradients of the conditioners, each row differently.
    expected, log_det = square_log_determinants(mixed)
    torch.testing.assert_close(log_det, expected, rtol=0, atol=1e-5)
    for temperature in (300.0, 900.0):
        residual, expected = steering_residual(mixed, temperature)
        torch.testing.assert_close(residual, torch.full_like(residual, expected), rtol=0, atol=1e-7)


@pytest.mark.parametrize("conditioner_dtype", [None, torch.float32])
@pytest.mark.parametrize("volume_preserving", [True, False])
def test_coupling_against_autograd(volume_preserving, conditioner_dtype):
    coupling = AffineCoupling(7, [0, 3, 4], [8], volume_preserving, conditioner_dtype).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in coupling.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    u = torch.randn(4, 7, generator=generator, dtype=torch.float64)
    y, log_det = coupling.forward_and_log_det(u)
    for direction, start in ((coupling.forward_and_log_det, u), (coupling.inverse_and_log_det, y)):
        for row in start:
            expected = direction(row[None])[1][0]
            jacobian = torch.func.jacrev(lambda z, f=direction: f(z[None])[0][0])(row)
            # Closer than seven digits: the determinant is independent of the conditioner.
            measured = torch.linalg.slogdet(jacobian)[1]
            torch.testing.assert_close(measured, expected, rtol=1e-9, atol=1e-9)
    back, inverse_log_det = coupling.inverse_and_log_det(y)
    torch.testing.assert_close(back, u, rtol=0, atol=1e-12)
    torch.testing.assert_close(inverse_log_det, -log_det, rtol=0, atol=1e-12)
    assert bool((log_det == 0).all()) == volume_preserving


def test_scale_is_one_number():
    scale = Scale(5, 3)
    with torch.no_grad():
        scale.log_k.fill_(0.3)
    y, log_det = scale.forward_and_log_det(torch.ones(2, 5))
    torch.testing.assert_close(y[0], torch.tensor([math.exp(0.3)] * 3 + [1.0, 1.0]))
    torch.testing.assert_close(log_det, torch.full((2,), 0.9))


def steering_residual(flow, temperature=300.0):
    """log p^tau' - kappa log p^tau over a batch, and its closed form for a constant Jacobian."""
    _, x, momenta = draw_inside(flow, 100)
    reference = flow.reference_temperature
    kappa = reference / temperature
    with torch.no_grad():
        log_prob, at_reference = (flow.log_prob(x, momenta, t) for t in (temperature, reference))
    size = flow.n_coordinates + flow.n_momenta
    tau = temperature / reference
    v = torch.zeros(1, size, dtype=torch.float64)
    log_det = flow.network.forward_and_log_det(v)[1]
    log_det = log_det + flow.whitening.forward_and_log_det(v[:, : flow.n_coordinates])[1]
    expected = -0.5 * size * math.log(2 * math.pi * tau)
    constant = log_det.item() + flow.log_multiplicity
    expected += kappa * 0.5 * size * math.log(2 * math.pi) + (kappa - 1) * constant
    return log_prob - kappa * at_reference, expected


def test_steering_condition_holds_for_the_tsf(tsf):
    """arXiv:2012.00429, eq. 4: the density's temperature scaling is exact."""
    assert tsf.is_constant_log_det
    for temperature in (300.0, 450.0, 900.0):
        residual, expected = steering_residual(tsf, temperature)
        torch.testing.assert_close(residual, torch.full_like(residual, expected), rtol=0, atol=1e-7)


@pytest.mark.parametrize("name", ["realnvp", "polar"])
def test_steering_condition_fails_without_a_constant_jacobian(name, request):
    flow = request.getfixturevalue(name)
    assert not flow.is_constant_log_det
    residual, _ = steering_residual(flow)
    assert residual.std() > 0.05


def square_log_determinants(flow, n=3):
    """slogdet of the Jacobian of (z, pose, q) -> (x, p), 3N + m squared, at random points."""
    layer, d = flow.coordinates, flow.n_coordinates

    def square(w):
        v, pose = w[: flow.n_coordinates + flow.n_momenta], w[-6:]
        y, _ = flow.network.forward_and_log_det(v[None])
        u, _ = flow.whitening.forward_and_log_det(y[:, :d])
        x = layer.from_pose(u, rotation(*pose[:3])[None], pose[None, 3:])
        return torch.cat([x.flatten(), y[0, d:]])

    v, _, _ = draw_inside(flow, n)
    generator = torch.Generator().manual_seed(8)
    pose = 1.6 * torch.rand(n, 6, generator=generator, dtype=torch.float64) - 0.8
    points = torch.cat([v, pose], dim=1)
    jacobians = torch.stack([torch.autograd.functional.jacobian(square, w) for w in points])
    return torch.linalg.slogdet(jacobians)[1], flow.forward_and_log_det(v)[1].detach()


@pytest.mark.parametrize("name", ["tsf", "realnvp", "polar"])
def test_jacobian_of_the_whole_map(name, request):
    expected, log_det = square_log_determinants(request.getfixturevalue(name))
    atol = 1e-7 if name == "tsf" else 1e-6
    torch.testing.assert_close(log_det, expected, rtol=0, atol=atol)
    spread = expected.max() - expected.min()
    assert spread < 1e-7 if name == "tsf" else spread > 1e-3


def test_sample_and_log_prob_agree(tsf):
    sample = tsf.sample(200, 450.0, torch.Generator().manual_seed(2))
    inside = torch.isfinite(sample.log_prob)
    assert inside.any()
    log_prob = tsf.log_prob(sample.x[inside], sample.momenta[inside], 450.0)
    torch.testing.assert_close(log_prob, sample.log_prob[inside], rtol=0, atol=1e-7)
    again = tsf.sample(200, 450.0, torch.Generator().manual_seed(2))
    assert torch.equal(again.log_prob, sample.log_prob)


def test_density_integrates_to_one():
    """exp(log_prob) of a flow on the plane, integrated on a grid."""
    flow = roughen(RealNVPFlow(2, 0, 2, (8,), seed=1))
    axis = torch.linspace(-20, 20, 801, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis)
    with torch.no_grad():
        density = flow.log_prob(grid, grid[:, :0], 1.7).exp()
    assert float(density.sum()) * (40 / 800) ** 2 == pytest.approx(1, abs=1e-6)


def test_every_parameter_has_a_gradient(tsf):
    v, x, momenta = draw_inside(tsf, 20)
    for output in (tsf.forward_and_log_det(v)[0][0].sum(), tsf.log_prob(x, momenta, 600).sum()):
        tsf.zero_grad()
        output.backward()
        for name, parameter in tsf.named_parameters():
            gradient = parameter.grad
            assert gradient is not None, name
            assert torch.isfinite(gradient).all(), name
            if "net.0" in name or "log_k" in name:
                assert gradient.abs().max() > 0, name
    tsf.zero_grad()


def test_mirror_images_are_outside(tsf):
    _, x, momenta = draw_inside(tsf, 10)
    mirrored = x * torch.tensor([1.0, 1.0, -1.0])
    assert tsf.is_mirror_image(mirrored).all()
    assert not tsf.is_mirror_image(x).any()
    assert torch.isneginf(tsf.log_prob(mirrored, momenta, 600)).all()


@pytest.mark.parametrize("name", ["tsf", "realnvp", "overlapping"])
def test_save_and_load(name, request, tmp_path, molecule):
    flow = request.getfixturevalue(name)
    path = tmp_path / "flow.pt"
    flow.save(path)
    for again in (type(flow).load(path, molecule), load_flow(path, molecule)):
        assert type(again) is type(flow)
        assert again.overlap == flow.overlap == (name == "overlapping")
        assert again.reference_temperature == 600
        v, x, momenta = draw_inside(flow, 5)
        with torch.no_grad():
            torch.testing.assert_close(again.forward_and_log_det(v)[0][0], x, rtol=0, atol=1e-12)
        assert torch.equal(again.log_prob(x, momenta, 300), flow.log_prob(x, momenta, 300))


def test_the_precision_of_conditioners_is_kept(mixed, tsf, tmp_path, molecule):
    path, x = tmp_path / "flow.pt", torch.tensor(molecule.positions)[None]
    momenta = torch.zeros(1, tsf.n_momenta, dtype=torch.float64)
    mixed.save(path)
    again = load_flow(path)
    assert again.conditioner_dtype == torch.float32
    assert again.dtype == torch.float64
    assert torch.equal(again.log_prob(x, momenta, 300), mixed.log_prob(x, momenta, 300))
    assert not torch.equal(again.log_prob(x, momenta, 300), tsf.log_prob(x, momenta, 300))
    content = torch.load(path, weights_only=True)
    del content["conditioner_dtype"]
    torch.save(content, path)
    with pytest.raises(ValueError, match="conditioner_dtype: expected an entry"):
        load_flow(path)
    tsf.save(path)
    again = load_flow(path)
    assert again.conditioner_dtype is None
    assert torch.equal(again.log_prob(x, momenta, 300), tsf.log_prob(x, momenta, 300))
    flow = TemperatureSteerableFlow(4, 4, 1, (8,), conditioner_dtype=torch.float32)
    assert flow.conditioner_dtype == torch.float32
    with pytest.raises(TypeError, match=r"conditioner_dtype: expected torch.float32"):
        flow.conditioner_dtype = torch.float16


def test_load_refuses_what_does_not_belong(tsf, tmp_path, molecule):
    path = tmp_path / "flow.pt"
    tsf.save(path)

    def refused(message, *arguments, error=ValueError, load=load_flow):
        with pytest.raises(error, match=message):
            load(*arguments)

    refused("another molecule", path, alanine_dipeptide("ff96-obc1"))
    refused("expected a realnvp flow, got tsf", path, load=RealNVPFlow.load)
    mirrored = dataclasses.replace(molecule, positions=molecule.positions * [1, 1, -1])
    refused("another stereoisomer", path, mirrored)
    content = torch.load(path, weights_only=True)
    for number, version in ((99, "a newer version"), (1, "an earlier version")):
        torch.save(content | {"format": number}, path)
        refused(f"written in format {number} by {version}", path)
    path.write_bytes(b"not a flow")
    refused("not a readable flow file", path)
    refused("no such flow file", tmp_path / "missing.pt", error=FileNotFoundError)


def test_draws_without_geometry_have_no_weight(overlapping):
    """Wide draws of an overlapping flow: log_prob is finite or +inf, never NaN."""
    drawn = overlapping.sample(2000, 60_000.0, torch.Generator().manual_seed(1))
    assert not bool(torch.isnan(drawn.log_prob).any())
    outside = ~torch.isfinite(drawn.log_prob)
    assert int(outside.sum()) > 0
    assert bool((drawn.log_prob[outside] == torch.inf).all())


def test_bad_arguments_are_refused(tsf, molecule):
    x = torch.tensor(molecule.positions)[None]
    momenta = torch.zeros(1, tsf.n_momenta, dtype=torch.float64)
    many = torch.full((1, 1), 300.0)
    for error, message, call, *arguments in (
        (TypeError, "x: expected torch.float64", tsf.log_prob, x.float(), momenta, 300),
        (ValueError, "momenta: expected shape", tsf.log_prob, x, momenta[:, 1:], 300),
        (ValueError, "temperature: expected a positive", tsf.log_prob, x, momenta, -1),
        (
            ValueError,
            "temperature: expected one number or one per row",
            tsf.log_prob,
            x,
            momenta,
            many,
        ),
        (ValueError, "n_momenta: a TSF expects at least 1", TemperatureSteerableFlow, 3, 0),
        (ValueError, "n_momenta: RealNVP has none", RealNVPFlow, 3, 2),
        (ValueError, "n_blocks: expected an integer", TemperatureSteerableFlow, 3, 3, 0),
        (ValueError, "transformed: expected a proper", AffineCoupling, 3, [0, 1, 2], [4], True),
    ):
        with pytest.raises(error, match=message):
            call(*arguments)


def test_a_flow_without_a_molecule():
    flow = roughen(TemperatureSteerableFlow(4, 3, 2, (8,), reference_temperature=2.0, seed=1))
    sample = flow.sample(10, 1.0, torch.Generator().manual_seed(0))
    assert sample.x.shape == (10, 4)
    assert sample.momenta.shape == (10, 3)
    assert torch.equal(flow.match_pose(sample.x, like=sample.x + 1), sample.x)
    assert flow.is_constant_log_det


def test_seeds_make_the_weights(dataset):
    one, same, other = (
        TemperatureSteerableFlow(4, 4, 1, (8,), seed=seed).network.state_dict()
        for seed in (1, 1, 2)
    )
    key = next(key for key in one if key.endswith("net.0.weight"))
    assert torch.equal(one[key], same[key])
    assert not torch.equal(one[key], other[key])


def test_whitened_coordinates_refuse_overlapping_copies(overlapping):
    with pytest.raises(ValueError, match="coordinates: expected copies that do not overlap"):
        WhitenedCoordinates(overlapping.whitening, overlapping.coordinates, 600.0)


def test_an_image_does_not_depend_on_the_batch():
    """Also where the conditioners run in float32, whose rounding would, by 1e-6 and more."""
    flow = roughen(TemperatureSteerableFlow(60, 60, 2, (128, 128), seed=1))
    flow.conditioner_dtype = torch.float32
    v = flow.sample_prior(64, 1.0, torch.Generator().manual_seed(1))
    (x, momenta), _ = flow.forward_and_log_det(v)
    for n in (1, 3, 8, 9, 13, 31, 47):
        (some, some_momenta), _ = flow.forward_and_log_det(v[-n:])
        torch.testing.assert_close(some, x[-n:], rtol=0, atol=1e-12)
        torch.testing.assert_close(some_momenta, momenta[-n:], rtol=0, atol=1e-12)
        back, _ = flow.inverse_and_log_det(x[:n], momenta[:n])
        torch.testing.assert_close(back, v[:n], rtol=0, atol=1e-12)


@pytest.mark.parametrize("flow_class", [RealNVPFlow, TemperatureSteerableFlow])
def test_a_flow_starts_as_its_base_measure(flow_class, tmp_path):
    """At every temperature, in memory and from a file; the base is a coupled one."""
    base = PhiFourChain(6, 0.05).coupled_gaussian(0.5)
    frames = MDDataset(base.sample(20, 0.3, torch.Generator().manual_seed(1)), 0.3)
    flow_class.from_dataset(frames, base=base, **SMALL).save(tmp_path / "flow.pt")
    flow = flow_class.load(tmp_path / "flow.pt")
    for kelvin in (0.3, 1.2):
        draws = flow.sample(50, kelvin, torch.Generator().manual_seed(2))
        of_momenta = torch.distributions.Normal(0.0, math.sqrt(kelvin / 0.3))
        expected = of_momenta.log_prob(draws.momenta).sum(1) + base.log_prob(draws.x, kelvin)
        torch.testing.assert_close(draws.log_prob, expected)


def test_base_measures_that_do_not_fit(dataset):
    frames = MDDataset(torch.zeros(4, 3), 1.0)
    for given, base, error, message in (
        (dataset, GaussianWell(torch.eye(60)), ValueError, "base: expected None for a molecule"),
        (frames, GaussianWell(torch.eye(2)), ValueError, r"base: .* shape \(3,\), got \(2,\)"),
        (frames, torch.eye(3), TypeError, "base: expected a GaussianWell or None, got Tensor"),
    ):
        with pytest.raises(error, match=message):
            RealNVPFlow.from_dataset(given, base=base, check=False, **SMALL)
