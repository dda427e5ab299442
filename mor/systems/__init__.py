"""Methods beside Mixture-of-Recursions that route tokens, on loaded models: one call each."""

from mor.systems.mod import apply_mod
from mor.systems.removal import remove

__all__ = ["apply_mod", "remove"]
