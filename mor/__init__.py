"""Mixture-of-Recursions for PyTorch: operators, modules, Hugging Face models, training.

Importing the package registers the operators (`torch.ops.mor.*`) and the model type `mor` with
Transformers' Auto classes.
"""

from mor.version import __version__  # isort: skip - before the rest, which may read it

from mor.models import MoRConfig, MoRForCausalLM, MoRModel, load_swapped, swap

__all__ = [
    "MoRConfig",
    "MoRForCausalLM",
    "MoRModel",
    "__version__",
    "load_swapped",
    "swap",
]
