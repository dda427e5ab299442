"""Methods beside Mixture-of-Recursions that route tokens, on loaded models: one call each."""

from mor.systems.dynamoe import apply_dynamoe
from mor.systems.mod import apply_mod
from mor.systems.pmod import apply_pmod
from mor.systems.pmod_layer import PMoD
from mor.systems.removal import remove
from mor.systems.token_merging import apply_token_merging
from mor.systems.video_mod import apply_video_mod
from mor.systems.video_mod_layer import VideoMoD

__all__ = [
    "PMoD",
    "VideoMoD",
    "apply_dynamoe",
    "apply_mod",
    "apply_pmod",
    "apply_token_merging",
    "apply_video_mod",
    "remove",
]
