"""Every operator of csrc/library.cpp has its kernels: CPU, fake, and CUDA where that was built."""

import pytest
import torch

import mor.ops

#: Not about tensors.
QUERIES = {"mor::instruction_set", "mor::cuda_architectures", "mor::operands"}
OPERATORS = sorted(
    name
    for name in torch._C._dispatch_get_all_op_names()
    if name.startswith("mor::") and name not in QUERIES
)


def test_public_operators_are_among_them() -> None:
    assert {f"mor::{name}" for name in mor.ops.__all__} <= set(OPERATORS)


@pytest.mark.parametrize("name", OPERATORS)
def test_cpu_and_fake_kernels_are_registered(name: str) -> None:
    assert torch._C._dispatch_has_kernel_for_dispatch_key(name, "CPU")
    assert torch._library.simple_registry.singleton.find(name).fake_impl.kernel is not None


@pytest.mark.cpu_kernels  # where those stand in for the CPU's, none has the key of CUDA
@pytest.mark.skipif(
    not torch.ops.mor.cuda_architectures(), reason="built without CUDA (MOR_CUDA=OFF)"
)
@pytest.mark.parametrize("name", OPERATORS)
def test_cuda_kernel_is_registered(name: str) -> None:
    assert torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA")
