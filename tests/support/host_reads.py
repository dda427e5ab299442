"""Reads of a tensor's values by the host, each of which waits for a device."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

#: Operators whose result, or whose result's size, needs a value on the host.
_READS = {
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.nonzero.default,
    torch.ops.aten.masked_select.default,
    torch.ops.aten.equal.default,
    torch.ops.aten.repeat_interleave.Tensor,
}


class _Record(TorchDispatchMode):
    def __init__(self, reads: list[str]) -> None:
        super().__init__()
        self.reads = reads

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _READS:
            self.reads.append(str(func))
        if func is torch.ops.aten.index.Tensor:
            self.reads += [str(func) for x in args[1] if x is not None and x.dtype == torch.bool]
        return func(*args, **(kwargs or {}))


@contextmanager
def host_reads() -> Iterator[list[str]]:
    """The operators inside that read a value: `.item()`, `bool()`, `nonzero`, an index by a mask.

    `.tolist()` passes unseen on the CPU; a run under FakeTensorMode, which has no values, finds it.
    """
    reads: list[str] = []
    with _Record(reads):
        yield reads
