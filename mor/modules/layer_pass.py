"""One forward call of the layers of a block, whoever owns them: with tokens, and without."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from mor.modules.packing import Packing

__all__ = ["LayerPass"]


class LayerPass(ABC):
    """The `Block` of a recursion: its layers during one forward call.

    What belongs to the call (caches, arguments, angles) is kept here and not on a module.
    """

    def __call__(self, x: Tensor, packing: Packing, step: int, rows: Tensor) -> Tensor:
        """One recursion step of rows [K, D]; see `mor.modules.recursion`."""
        if x.shape[0] > 0:
            return self.run(x, packing, step, rows)
        if not _every_process_waits():
            return x
        # Transformers' layers cannot reshape zero rows, so they get one, whose result is dropped.
        return self.run_dummy_row(x.new_zeros(1, x.shape[1]) + 0 * x.sum(), step)[:0]

    @abstractmethod
    def run(self, x: Tensor, packing: Packing, step: int, rows: Tensor) -> Tensor:
        """The layers of a step on rows [K, D], at least one."""

    @abstractmethod
    def run_dummy_row(self, x: Tensor, step: int) -> Tensor:
        """The layers of a step on a row [1, D] that belongs to no sequence and no cache."""


def _every_process_waits() -> bool:
    """Whether the layers of a step must run though no token takes it.

    With gradients, or DDP waits for those that never come and an optimizer sees other parameters
    than in the step before. With several processes, or sharded layers (FSDP, ZeRO) wait for a
    process that does not gather them.
    """
    if torch.is_grad_enabled():
        return True
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return False
    return distributed.get_world_size() > 1
