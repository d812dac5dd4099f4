"""Energies and forces of whole batches, block by block, compiled where that is possible."""

import logging

import torch
from torch import Tensor

from openmm_tsf.potentials.arguments import TorchSettings
from openmm_tsf.potentials.blocks import (
    MIN_COMPILED_ROWS,
    EnergyFunction,
    block_threads,
    compiled_block_size,
    eager_block_size,
    evaluate_eagerly,
    replace_non_finite,
    run_blocks,
)
from openmm_tsf.potentials.compilation import CompiledEnergy

logger = logging.getLogger(__name__)


class BatchEvaluator:
    """Evaluates energies [B] and their gradient on batches of any size.

    `function` computes the energies of positions [3, N, B] and global parameters; `compiled` is
    what evaluates large batches, if compilation was requested.
    """

    def __init__(self, function: EnergyFunction, n_atoms: int, settings: TorchSettings) -> None:
        self._function = function
        self._n_atoms = n_atoms
        self._device = settings.device
        sizes = n_atoms, settings.dtype, settings.device, settings.memory
        self._block_size = eager_block_size(*sizes)
        self.compiled: CompiledEnergy | None = None
        if settings.compile:
            size = compiled_block_size(*sizes)
            if size >= MIN_COMPILED_ROWS:
                self.compiled = CompiledEnergy(function, n_atoms, size)
            else:
                reason = (
                    f"blocks of {size} conformations of {n_atoms} atoms fill the memory allowed"
                )
                logger.warning("not compiled, evaluating eagerly: %s", reason)

    # Outside inference mode and autocast: neither may remove the gradient or reduce the precision.
    @torch.inference_mode(False)
    def __call__(
        self, x: Tensor, parameters: tuple[Tensor, ...], with_forces: bool
    ) -> tuple[Tensor, Tensor | None, int | Tensor]:
        """Return energies [B], forces [B, N, 3] if requested, and the number of non-finite rows.

        Rows of `x` [B, N, 3] that are not finite get +inf and zero force.
        """
        x = x.clone() if x.is_inference() else x.detach()
        energies = x.new_empty(len(x))
        forces = torch.empty_like(x) if with_forces else None
        counts: list[int | Tensor] = []
        pays = self.compiled is not None and self.compiled.pays_for(len(x))
        compiled = self.compiled if pays else None

        def run(rows: slice) -> None:
            with torch.autocast(self._device.type, enabled=False):
                y = x[rows].permute(2, 1, 0).contiguous()
                if compiled is not None:
                    energy, gradient = compiled(y, parameters, with_forces)
                else:
                    energy, gradient = evaluate_eagerly(self._function, y, parameters, with_forces)
            # Here and not for the whole batch: its temporaries would be as large as the batch.
            force = None if gradient is None else -gradient.permute(2, 1, 0)
            counts.append(replace_non_finite(energy, force))
            energies[rows] = energy
            if forces is not None and force is not None:
                forces[rows] = force

        size = self._block_size if compiled is None else compiled.block_size
        with torch.no_grad():
            run_blocks(run, len(x), size, block_threads(self._n_atoms, self._device))
        return energies, forces, sum(counts)
