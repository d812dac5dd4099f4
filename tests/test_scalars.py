"""Numbers, integers and truth values as scalars of numpy, arrays and tensors; never quantities."""

import dataclasses
import json

import numpy as np
import openmm.unit as unit
import pytest
import torch

import openmm_tsf as tsf
from openmm_tsf import kernels
from openmm_tsf.flows.draws import draw_weighted
from openmm_tsf.io.serialization import to_plain_data
from openmm_tsf.potentials import DoubleWell, GaussianWell, MixedDoubleWell
from openmm_tsf.workflow.options import RunOptions
from openmm_tsf.workflow.settings import FlowSettings, MDSettings, RunSettings, SamplingSettings
from tests.support.number_cases import (
    DYNAMICS,
    SCALARS,
    Subject,
    assert_alike,
    generator,
    plain,
    rows,
    small,
)


@pytest.fixture(scope="module")
def subject(tmp_path_factory):
    return Subject(tmp_path_factory.mktemp("numbers"))


def fields_of(*classes):
    """Every field of settings that is a number, with a value for it."""
    special = {"n_momenta": 3, "patience": 4, "temperature": 300.0, "seed": 3, "threads": 1,
               "n_chains": 0, "checkpoint_seconds": 60.0}  # fmt: skip
    for cls in classes:
        for field in dataclasses.fields(cls):
            value = special.get(field.name, field.default)
            if isinstance(value, (bool, int, float)):
                yield pytest.param(cls, field.name, value, id=f"{cls.__name__}-{field.name}")


@pytest.mark.parametrize(
    ("cls", "name", "value"),
    list(fields_of(MDSettings, FlowSettings, SamplingSettings, RunSettings, tsf.FitSettings,
                   RunOptions, kernels.SequenceSettings)),
)  # fmt: skip
def test_fields_of_settings(cls, name, value):
    for kind, convert in SCALARS.items():
        made = cls(**{name: convert(value)})
        if name in ("beta", "sigma", "local_timestep", "local_friction", "local_steps"):
            continue  # checked by the kernels that take them
        got = getattr(made, name)
        assert type(got) is type(value), kind
        assert got == (value if "small" not in kind else small(value).item())
        json.dumps(to_plain_data(made))
    if name in ("beta", "sigma", "local_timestep", "local_friction", "local_steps"):
        return
    for wrong in (value * unit.mole, np.asarray(value) * unit.mole, np.asarray([value, value])):
        with pytest.raises((TypeError, ValueError), match=f"^{name}: expected "):
            cls(**{name: wrong})


def scheduled(**numbers):
    return kernels.Scheduled(kernels.PlainSwap((1.0, 2.0), 1.0), **numbers)


def gathered(subject, **changes):
    sampler = subject.toy_sampler()
    x = sampler.run(**{"n_iterations": 4, "collect": True, "progress": False} | changes)
    return x.shape


def walked(subject, kind=kernels.FlowWalk, **changes):
    return kind(*subject.toys, subject.ladder, **changes).settings()


#: Numbers, integers, truth values and sequences of them, without a unit.
WITHOUT_UNIT = [
    ("Scheduled", lambda s, v: scheduled(interval=v).interval, "interval", 3),
    ("Scheduled", lambda s, v: scheduled(repeats=v).repeats, "repeats", 3),
    ("FlowWalk", lambda s, v: walked(s, n_steps=v), "n_steps", 3),
    ("FlowWalk", lambda s, v: kernels.FlowWalk(*s.toys, s.ladder, v).sigma, "sigma", 0.25),
    ("FlowWalk", lambda s, v: kernels.FlowWalk(*s.toys, s.ladder, v).sigma, "sigma", [0.25, 0.5]),
    ("FlowWalk", lambda s, v: walked(s, round_trip_interval=v), "round_trip_interval", 3),
    ("FlowWalk", lambda s, v: walked(s, round_trip_walkers=v), "round_trip_walkers", 3),
    ("LatentHMC", lambda s, v: walked(s, kernels.LatentHMC, n_leapfrog=v), "n_leapfrog", 3),
    ("LatentHMC", lambda s, v: walked(s, kernels.LatentHMC, jitter=v), "jitter", 0.25),
    ("CartesianHMC", lambda s, v: s.kernel(kernels.CartesianHMC, persistence=v), "persistence",
     0.25),
    *[(kind.__name__, lambda s, v, kind=kind: s.kernel(kind, n_steps=v), "n_steps", 3)
      for kind in (*DYNAMICS, kernels.CartesianHMC)],
    *[(kind.__name__, lambda s, v, kind=kind: s.kernel(kind, metropolized=v), "metropolized",
       False) for kind in DYNAMICS],
    ("OpenMMLangevin", lambda s, v: s.kernel(kernels.OpenMMLangevin, n_contexts=v), "n_contexts",
     2),
    ("PlainSwap", lambda s, v: kernels.PlainSwap((1, 2, 3), 1.0, v).settings(), "scheme",
     [[0, 2]]),
    ("OneOf", lambda s, v: kernels.OneOf(
        [kernels.PlainSwap((1, 2), 1.0), kernels.PlainSwap((1, 2), 1.0, name="b")], v).settings(),
     "weights", [0.25, 0.75]),
    ("sampler", lambda s, v: s.toy_sampler(n_walkers=v).n_walkers, "n_walkers", 3),
    ("sampler", lambda s, v: s.toy_sampler(seed=v).seed, "seed", 3),
    ("sampler.run", lambda s, v: gathered(s, n_iterations=v), "n_iterations", 3),
    ("sampler.run", lambda s, v: gathered(s, save_interval=v), "save_interval", 2),
    ("sampler.run", lambda s, v: gathered(s, checkpoint_interval=v), "checkpoint_interval", 2),
    ("sampler.tune", lambda s, v: s.toy_sampler().tune(v), "n_iterations", 3),
    ("sampler.tune", lambda s, v: s.toy_sampler().tune(3, v), "target_acceptance", 0.25),
    ("MDDataset", lambda s, v: tsf.MDDataset(s.frames, 1.0, weight=v).weight, "weight", 0.5),
    ("MDDataset", lambda s, v: tsf.MDDataset(s.frames, 1.0, n_evaluations=v).n_evaluations,
     "n_evaluations", 3),
    ("MDDataset", lambda s, v: tsf.MDDataset(s.frames[:3], 1.0, chains=v).chains, "chains",
     [0, 1, 2]),
    ("split", lambda s, v: len(tsf.MDDataset(s.frames, 1.0).split(n_blocks=v).test), "n_blocks",
     5),
    ("flow", lambda s, v: tsf.TemperatureSteerableFlow(v, 2, 1, (4,)).n_coordinates,
     "n_coordinates", 2),
    ("flow", lambda s, v: tsf.TemperatureSteerableFlow(2, v, 1, (4,)).n_momenta, "n_momenta", 2),
    ("flow", lambda s, v: tsf.TemperatureSteerableFlow(2, 2, v, (4,)).n_blocks, "n_blocks", 2),
    ("flow", lambda s, v: tsf.TemperatureSteerableFlow(2, 2, 1, v).hidden, "hidden", [4, 8]),
    ("flow", lambda s, v: list(tsf.TemperatureSteerableFlow(2, 2, 1, (4,), seed=v).parameters()),
     "seed", 3),
    ("flow.sample", lambda s, v: s.flow.sample(v, 300, generator()).x, "n", 3),
    ("draw_weighted", lambda s, v: draw_weighted(*s.toys, 1.0, v, generator()).x, "n", 3),
    ("fit", lambda s, v: s.fitted(seed=v), "seed", 3),
    ("FitSettings", lambda s, v: tsf.FitSettings(ramp=v), "ramp", [0.25, 0.5]),
    ("FlowSettings", lambda s, v: FlowSettings(hidden=v), "hidden", [4, 8]),
    ("OpenMMPotential", lambda s, v: tsf.OpenMMPotential(s.system, "Reference", n_contexts=v)
     .n_contexts, "n_contexts", 2),
    ("OpenMMPotential", lambda s, v: tsf.OpenMMPotential(s.system, "CPU", {"Threads": v}, 1)
     .platform_properties, "platform_properties", 1),
    ("OpenMMPotential", lambda s, v: tsf.OpenMMPotential(
        s.system, "CPU", {"DeterministicForces": v}, 1).platform_properties,
     "platform_properties", True),
    ("from_system", lambda s, v: tsf.TorchPotential.from_system(s.system, memory=v).memory,
     "memory", 2**24),
    ("from_system", lambda s, v: tsf.TorchPotential.from_system(s.system, force_groups=v)
     .force_groups, "force_groups", 0),
    ("from_system", lambda s, v: tsf.TorchPotential.from_system(s.system, force_groups=v)
     .force_groups, "force_groups", [0, 1]),
    ("from_system", lambda s, v: tsf.TorchPotential.from_system(s.system, compile=v)
     .compile_requested, "compile", False),
    ("from_system", lambda s, v: len(tsf.TorchPotential.from_system(s.system, tolerance=v)
     .agreement), "tolerance", [0.25, 0.25]),
    ("check", lambda s, v: len(s.potential.check(n_conformations=v)), "n_conformations", 2),
    ("DoubleWell", lambda s, v: DoubleWell(v, -1.0, 0.25).a, "a", 0.25),
    ("DoubleWell.sample", lambda s, v: s.well.sample(v, 1.0, generator()), "n", 3),
    ("GaussianWell.sample", lambda s, v: GaussianWell(torch.eye(2)).sample(v, 1.0, generator()),
     "n", 3),
    ("MixedDoubleWell", lambda s, v: MixedDoubleWell.random(v, 1).mixing, "dimension", 3),
    ("MixedDoubleWell", lambda s, v: MixedDoubleWell.random(2, v).mixing, "seed", 3),
]  # fmt: skip


@pytest.mark.filterwarnings("ignore:tune. the step sizes")
@pytest.mark.parametrize(("call", "name", "value"), rows(WITHOUT_UNIT))
def test_numbers_without_a_unit(subject, call, name, value):
    expected = plain(call(subject, value))
    is_sequence = isinstance(value, list)
    if is_sequence:
        array = np.asarray(value)
        short = array.astype(np.float32 if array.dtype == np.float64 else np.int32)
        given = [array, short, torch.from_numpy(array.copy()), tuple(value), list(array)]
    else:
        given = [convert(value) for convert in SCALARS.values()]
    for same in given:
        got = plain(call(subject, same))
        json.dumps(got)
        assert_alike(expected, got)
    numbers = np.asarray(value) if is_sequence else value
    for wrong in (numbers * unit.mole, np.asarray(numbers) * unit.mole, 1 * unit.mole):
        with pytest.raises((TypeError, ValueError), match=f"^{name}: expected "):
            call(subject, wrong)


def test_names_of_numpy(subject):
    made = FlowSettings(kind=np.str_("tsf"), metric=np.array("volume"))
    assert (type(made.kind), type(made.metric)) == (str, str)
    swap = kernels.PlainSwap((1, 2), 1.0, np.str_("even_odd"), np.str_("a"), np.str_("odd"))
    assert type(swap.name) is type(swap.settings()["scheme"]) is str


def test_a_run_of_numpys_numbers_can_be_resumed(subject, tmp_path):
    numbers = {"n_walkers": np.array(4), "seed": torch.tensor(3)}
    sampler = subject.toy_sampler(**numbers)
    every = torch.tensor(1)
    sampler.run(np.array(2), tmp_path / "run", save_interval=every, checkpoint_interval=every)
    again = subject.toy_sampler(n_walkers=4, seed=3)
    again.run(2, tmp_path / "plain")
    for name in ("config.json", "segments/00000000.npz"):
        assert (tmp_path / "run" / name).exists() == (tmp_path / "plain" / name).exists()
    resumed = subject.toy_sampler(**numbers).resume(tmp_path / "run")
    assert torch.equal(resumed.state.x, again.state.x)
