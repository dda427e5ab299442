"""Mixture-of-Recursions for PyTorch: operators, modules, Hugging Face models, training.

Importing this package registers the operators (`torch.ops.mor.*`) and, with Transformers, the `mor` model type.
"""

from mor.version import __version__

__all__ = ["__version__"]
