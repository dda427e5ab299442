"""Versions and build of mor: the work of `mor info`."""

import platform
from importlib.metadata import version

__all__ = ["describe"]


def describe() -> dict[str, str]:
    """Versions, the instruction set in use, and CUDA support of mor and of torch.

    Raises:
        ImportError: the compiled libraries are missing.
    """
    import torch

    import mor.ops
    from mor import _host

    architectures = torch.ops.mor.cuda_architectures()
    cuda = f"yes, for {architectures}" if architectures else "no (no nvcc, or MOR_CUDA=OFF)"
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no device"
    return {
        "mor": mor.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "compiler": _host.compiler(),
        "instruction set": torch.ops.mor.instruction_set(""),
        "CUDA operators": cuda,
        "torch's CUDA": f"{torch.version.cuda or 'none'}, {device}",
    }
