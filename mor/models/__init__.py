"""Hugging Face models: MoRConfig, MoRModel, MoRForCausalLM, registered with the Auto classes."""

from mor.models.apply_dynamoe import apply_dynamoe
from mor.models.authors_checkpoint import load_authors_checkpoint
from mor.models.configuration_mor import MoRConfig
from mor.models.modeling_mor import MoRForCausalLM, MoRModel
from mor.models.outputs import MoRCausalLMOutput, MoRModelOutput
from mor.models.swap import load_swapped, swap

__all__ = [
    "MoRCausalLMOutput",
    "MoRConfig",
    "MoRForCausalLM",
    "MoRModel",
    "MoRModelOutput",
    "apply_dynamoe",
    "load_authors_checkpoint",
    "load_swapped",
    "swap",
]
