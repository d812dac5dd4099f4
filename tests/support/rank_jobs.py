"""What the tests of training over ranks run on each of them."""

import dataclasses
import io
import os
import signal
import socket
import threading
import time
from contextlib import redirect_stderr, redirect_stdout, suppress

import torch

from openmm_tsf.cli.main import main
from openmm_tsf.training import fit, frames, objectives, path_objective
from openmm_tsf.training.basins import BasinPartition
from openmm_tsf.training.frames import FramePicker
from openmm_tsf.training.objectives import DirectObjective
from openmm_tsf.training.parallel import sum_gradients
from openmm_tsf.training.path_objective import PathObjective
from openmm_tsf.training.step_numbers import StepNumbers
from openmm_tsf.training.target import Target
from openmm_tsf.training.trainer import Trainer
from openmm_tsf.utils.distributed import Ranks, current_ranks
from tests.support.path_training import FAR, SHORT, SignBasins, rough_flow, toy, weights

DOUBLE = dataclasses.replace(
    SHORT, dtype=torch.float64, basin_share=0.4, basin_weight=0.6, n_chains=40, batch_size=62
)
DIRECT = dataclasses.replace(
    DOUBLE, estimator="direct", n_chains=0, basin_share=0.0, temperatures=(1.0,), kl_batch_size=30
)
STEP = 12  # lambda and the share of the chains have risen
N_DRAWS = DOUBLE.kl_batch_size // 2


def noise(*shape, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def use_fixed_points(ranks, settings):
    """Let every draw be this rank's part of fixed points, however many ranks there are."""
    n_frames = settings.batch_size
    part = ranks.share(n_frames)
    indices = torch.randint(1000, (n_frames,), generator=torch.Generator().manual_seed(7))

    def draw(self, n, generator):
        assert n in (0, part.stop - part.start)
        return indices[part][:n]

    def draw_normal(tau, width, generator):
        if settings.estimator == "direct":
            n, rungs = settings.kl_batch_size, 1
            of_frames = len(tau) == ranks.count_share(n_frames)
        else:
            n, rungs = N_DRAWS, 2
            of_frames = len(tau) > rungs * ranks.count_share(n)
        parts = [noise(n_frames, width, seed=1)[part]] if of_frames else []
        if not of_frames or settings.estimator == "path":
            of_rungs = noise(rungs, n, width, seed=2 + of_frames)[:, ranks.share(n)]
            parts.append(of_rungs.flatten(0, 1))
        return torch.cat(parts) * tau.sqrt()[:, None]

    FramePicker.draw = draw
    path_objective.draw_normal = objectives.draw_normal = draw_normal
    assert frames.FramePicker is FramePicker


def path_objective_of(ranks, state=None):
    potential, data = toy()
    flow, basins = rough_flow("tsf"), SignBasins()
    target = Target(flow, potential, basins, FAR)
    generator = torch.Generator().manual_seed(1)
    train = [data.split().train]
    objective = PathObjective(flow, train, target, DOUBLE, generator, StepNumbers(), ranks)
    if state is not None:
        objective.load_state_dict(state)
    return flow, objective, generator


def some_state():
    """A state of chains and running estimates, as in the middle of a training."""
    _, objective, _ = path_objective_of(Ranks())
    state = objective.state_dict() | {"relaxed": True}
    state["population_ratios"] = 0.3 * noise(2, 2, seed=3)
    state["basins_met"] = torch.ones(2, 2, dtype=torch.float64)
    state["products"] = noise(*state["products"].shape, seed=4).abs()
    state["products"][1] *= 2
    state["chains"]["y"] = state["chains"]["y"] + 0.1 * noise(*state["chains"]["y"].shape, seed=5)
    return state


def in_turn(chains, size):
    """The state of all chains, in an order in which one rank's turn is that of several ranks."""
    n = DOUBLE.n_chains
    ranks = [Ranks(rank, size) for rank in range(size)]
    first = [i for r in ranks for i in range(n)[r.share(n)][: r.count_share(N_DRAWS)]]
    order = first + [i for i in range(n) if i not in first]
    rows = torch.tensor([rung * n + i for rung in range(2) for i in order])
    kept = {name: chains[name] for name in ("step_sizes", "next")}
    return {name: value[rows] for name, value in chains.items() if name not in kept} | kept


def path_gradients(ranks):
    """Gradients and running estimates of a step of all ranks, and of one with the same points."""
    state, results, draw = some_state(), [], FramePicker.draw
    for each in (ranks, Ranks()):
        FramePicker.draw = draw
        chains = state["chains"] if each.size > 1 else in_turn(state["chains"], ranks.size)
        flow, objective, generator = path_objective_of(each, {**state, "chains": chains})
        use_fixed_points(each, DOUBLE)
        flow.network.requires_grad_()
        objective.backward(flow.network, STEP, generator)
        if each.size > 1:
            sum_gradients(each, flow.network, objective.exchanged, (0.0,))
        objective.update(generator)
        results.append(
            (
                torch.cat([p.grad.flatten() for p in flow.network.parameters()]),
                torch.cat([v.flatten() for v in objective.populations.state_dict().values()]),
                objective.control.products.flatten(),
            )
        )
    return results


def direct_gradients(ranks, far=1e9):
    """As :func:`path_gradients`; draws above the energy `far` have no finite one."""
    results = []
    potential, data = toy()
    for each in (ranks, Ranks()):
        use_fixed_points(each, DIRECT)
        flow = rough_flow("tsf")
        target = Target(flow, Cut(potential, far), BasinPartition.find([data]), FAR)
        generator = torch.Generator().manual_seed(1)
        parts = [data.split().train], target, BasinPartition.find([data]), DIRECT
        objective = DirectObjective(flow, *parts, generator, StepNumbers(), each)
        objective.backward(flow.network, STEP, generator)
        if each.size > 1:
            sum_gradients(each, flow.network, objective.exchanged, (0.0,))
        results.append((torch.cat([p.grad.flatten() for p in flow.network.parameters()]),))
    return results


class Cut:
    """A potential whose energy is infinite above a limit."""

    def __init__(self, potential, limit):
        self.potential, self.limit = potential, limit
        self.boltzmann_constant = potential.boltzmann_constant

    def energy(self, x):
        energy = self.potential.energy(x)
        return torch.where(energy > self.limit, torch.inf, energy)


TRAINING = dataclasses.replace(
    SHORT, n_steps=8, validate_interval=4, basin_share=0.4, basin_weight=0.6
)
PLAIN = dataclasses.replace(TRAINING, estimator="direct", n_chains=0, optimizer="adam")


def prepare():
    BasinPartition.find = staticmethod(lambda datasets: SignBasins())
    path_objective.RELAXATION_STEPS = 4
    return toy()


def make_steps(ranks, settings, n_steps, not_a_number_at=None):
    """Steps of a training: weights, moments, populations, numbers of steps skipped."""
    potential, data = prepare()
    trainer = Trainer(rough_flow("tsf"), [data], potential, settings, 3, ranks)
    backward = trainer.objective.backward

    def spoiled(network, *arguments):
        backward(network, *arguments)
        next(network.parameters()).grad.fill_(torch.nan)

    for step in range(n_steps):
        is_spoiled = step == not_a_number_at and ranks.rank == 1
        trainer.objective.backward = spoiled if is_spoiled else backward
        trainer.train_step()
    state = trainer.network.state_dict()
    moments = [
        value
        for optimizer in trainer.optimizers.values()
        for entry in optimizer.state_dict()["state"].values()
        for value in entry.values()
    ]
    populations = []
    if isinstance(trainer.objective, PathObjective):
        populations = list(trainer.objective.populations.state_dict().values())
    return [*state.values(), *moments, *populations], trainer.n_skipped, trainer.n_evaluations


def train(ranks, folder, settings, resume=False, at_step=None, number=signal.SIGTERM):
    """A whole training; rank 1 gets a signal after a step, if one is given."""
    potential, data = prepare()
    flow = rough_flow("tsf")
    step = Trainer.train_step

    def signalled(self, *asked):
        step(self, *asked)
        if self.step == at_step and ranks.rank == 1:
            os.kill(os.getpid(), number)

    Trainer.train_step = signalled
    try:
        result = fit(
            flow,
            data,
            potential,
            settings=settings,
            seed=3,
            log_path=folder / "log.csv",
            checkpoint_path=folder / "training.pt",
            checkpoint_seconds=1e9,
            resume=resume,
            progress=False,
        )
    except KeyboardInterrupt:
        return "interrupted", None, weights(flow)
    return result.n_evaluations, result.history, weights(flow)


def exchange(ranks):
    """What three ranks get of each other."""
    sums = [(1.5, 0.0), (2.0, torch.inf), (3.0, 1.0)][ranks.rank]
    sums = torch.tensor(sums, dtype=torch.float64)
    counts = torch.tensor([(2**60, 1, 2)[ranks.rank]], dtype=torch.int64)
    weights = torch.arange(2.0) + ranks.rank
    plain = {"rank": ranks.rank, "numbers": [0.1, float("inf")], "text": "ä", "nothing": None}
    ranks.barrier()
    now = current_ranks()
    return (
        ranks.sum_(sums),
        ranks.sum_(counts),
        ranks.broadcast_(weights),
        ranks.broadcast(plain),
        (now.rank, now.size),
    )


def leave(ranks, how):
    """Rank 1 does not come to a sum."""
    if ranks.rank == 1:
        if how == "error":
            raise ValueError("no more")
        if how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(4)
    ranks.sum_(torch.zeros(1, dtype=torch.int64))


def wait_interrupted(ranks):
    """Rank 1 gets SIGINT while it waits for rank 0; the seconds until it notices."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if ranks.is_first:
        time.sleep(4)
        return 0.0
    start = time.monotonic()
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
    try:
        ranks.broadcast()
    except KeyboardInterrupt:
        return time.monotonic() - start


def probes(ranks):
    """Of every TCP connection to a rank: seconds until it is probed, and until it is given up."""
    ranks.barrier()
    found = []
    for name in os.listdir("/proc/self/fd"):
        try:
            link = os.readlink(f"/proc/self/fd/{name}")
        except FileNotFoundError:  # that of the folder
            continue
        if not link.startswith("socket:"):
            continue
        with socket.socket(fileno=os.dup(int(name))) as connection, suppress(OSError):
            if connection.family != socket.AF_UNIX and connection.getpeername():
                is_probed = connection.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
                options = socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_USER_TIMEOUT
                found.append(
                    (is_probed, *(connection.getsockopt(socket.IPPROTO_TCP, o) for o in options))
                )
    ranks.barrier()  # until then rank 0 keeps the store
    return found


def run_program(ranks, arguments, stop_when=None, number=signal.SIGTERM):
    """The program with these arguments on a rank: its status, and what it printed.

    Once the file `stop_when` exists, rank 1 gets a signal.
    """
    if stop_when is not None and ranks.rank == 1:
        threading.Thread(target=_stop_when, args=(stop_when, number), daemon=True).start()
    with redirect_stdout(io.StringIO()) as output, redirect_stderr(io.StringIO()) as errors:
        status = main(arguments)
    return status, output.getvalue(), errors.getvalue()


def _stop_when(path, number):
    while not path.exists():
        time.sleep(0.02)
    os.kill(os.getpid(), number)
