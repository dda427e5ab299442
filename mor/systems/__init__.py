"""Methods beside Mixture-of-Recursions that route tokens, on loaded models: one call each."""

from mor.systems.dynamoe import apply_dynamoe
from mor.systems.mod import apply_mod
from mor.systems.pmod import apply_pmod
from mor.systems.pmod_layer import PMoD
from mor.systems.removal import remove

__all__ = ["PMoD", "apply_dynamoe", "apply_mod", "apply_pmod", "remove"]
