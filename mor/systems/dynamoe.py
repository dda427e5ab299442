"""mor.apply_dynamoe: the MLPs of a loaded decoder replaced by mixtures of experts."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mor.models.arguments import wants_tuple
from mor.models.derived_class import Derived, derived_class, forward_of
from mor.models.router_losses import TellsLostLosses, hand_over, take_back, tell_lost
from mor.models.targets import batch_share, num_targets
from mor.modules.dynamoe import DynaMoE, expert_balancing_loss
from mor.modules.recursion import LastRouting
from mor.schedules import EXPERTS, Schedule
from mor.systems.applied import applied, record

__all__ = ["apply_dynamoe"]

INITIALISATIONS = ("dense", "fresh")


def apply_dynamoe(
    model: PreTrainedModel,
    num_experts: int | Sequence[int] | Schedule,
    *,
    init: str = "dense",
    balancing_coefficient: float = 0.01,
    **options: Any,
) -> PreTrainedModel:
    """Replaces the MLP of every layer of a loaded decoder, in place, by `mor.modules.DynaMoE`.

    Args:
        model: a causal language model whose MLPs are gated, as Llama's: `gate_proj`, `up_proj` (or
            both as `gate_up_proj`) and `down_proj`; it stays in the mode it is in.
        num_experts: of every layer, or one for each, as `mor.schedules.expert_schedule`.
        init: "dense": every expert begins as the layer's MLP, and the model computes what it did,
            whichever experts a token takes. "fresh": from scratch, as Transformers would.
        balancing_coefficient: weight in `output.loss`, in training, of the layers' mean
            `balancing_loss` (1 where all experts are used alike; pads do not count). The paper
            trains without: 0.
        **options: of `DynaMoE` and `ExpertGate`, as `gate` and `threshold`.

    Returns:
        The same model. `model.model.layers[i].mlp.num_active_experts` and `.routing` tell of the
        last call. `mor.remove(model)` puts the dense MLPs back as they were; until then they are
        kept beside the model's parameters. To load a state dict, apply the same to a new dense
        model first. Under gate="batch_quantile", pads count for the quantile of a batch in
        training.

    Raises:
        ValueError: an option with a value it does not take, numbers of experts that do not match
            the layers, a model with MLPs of another kind or already changed by mor.

    Reference: DynaMoE (arXiv 2603.01697). Experts that begin as a dense MLP are ours.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(hidden_size=32, intermediate_size=64, num_attention_heads=4,
        ...     num_hidden_layers=2, vocab_size=64)
        >>> model = apply_dynamoe(LlamaForCausalLM(config), (4, 2), gate="mass")
        >>> model.model.layers[0].mlp.experts
        Experts(
          4 x (32 -> 128 -> 32)
          (activation): SiLUActivation()
        )
    """
    if init not in INITIALISATIONS:
        raise ValueError(f"apply_dynamoe: init: expected one of {INITIALISATIONS}, got {init!r}")
    if not balancing_coefficient >= 0:
        raise ValueError(
            "apply_dynamoe: balancing_coefficient: expected a number of at least 0, got "
            f"{balancing_coefficient}"
        )
    if getattr(getattr(model, "config", None), "model_type", None) == "mor":
        raise ValueError(
            "apply_dynamoe: expected a dense decoder, got a MoR model, whose layers see packed "
            "tokens, several times"
        )
    if applied(model) or isinstance(model, Derived):
        was = ", ".join(f"apply_{name}" for name in applied(model)) or "mor.swap"
        raise ValueError(
            f"apply_dynamoe: expected a model that mor has not changed, got one after {was}; "
            "mor.remove(model) takes off what apply_* put on"
        )
    if isinstance(num_experts, Schedule) and num_experts.unit != EXPERTS:
        raise ValueError(
            f"apply_dynamoe: num_experts: expected a schedule of {EXPERTS}, got {num_experts.name} "
            f"of the {num_experts.unit}"
        )
    layers = _layers(model)
    given: Any = num_experts
    counts = [given] * len(layers) if isinstance(given, int) else list(given)
    if len(counts) != len(layers):
        raise ValueError(
            f"apply_dynamoe: num_experts: expected one number for each of the {len(layers)} layers,"
            f" got {len(counts)}"
        )
    std = getattr(model.config.get_text_config(), "initializer_range", 0.02)
    mixtures = [
        _mixture(layer.mlp, count, init, std, options)
        for layer, count in zip(layers, counts, strict=True)
    ]
    record(model, "dynamoe", _Undo([layer.mlp for layer in layers]))
    for layer, mixture in zip(layers, mixtures, strict=True):
        layer.mlp = mixture.train(layer.mlp.training)
    decoder = model.get_decoder()
    decoder.__class__ = derived_class(_Decoder, type(decoder))
    decoder.balancing_coefficient, decoder.last_loss = balancing_coefficient, LastRouting()
    model.__class__ = derived_class(_LanguageModel, type(model))
    return model


@dataclass
class _Undo:
    """Puts the dense MLPs and classes back.

    Attributes:
        mlps: of the layers, from the first.
    """

    mlps: list[nn.Module]

    def __call__(self, model: Any) -> None:
        decoder = model.get_decoder()
        for layer, mlp in zip(decoder.layers, self.mlps, strict=True):
            now = layer.mlp.experts.down_proj
            layer.mlp = mlp.to(device=now.device, dtype=now.dtype).train(layer.mlp.training)
        del decoder.balancing_coefficient, decoder.last_loss
        decoder.__class__ = decoder.dense_class
        model.__class__ = model.dense_class


class _Decoder(Derived):
    """Before the class of a dense decoder (`LlamaModel`): makes the balancing loss of a call."""

    layers: Any
    training: bool
    balancing_coefficient: float
    last_loss: LastRouting

    @classmethod
    def attributes(cls, dense: Any) -> dict[str, Any]:
        """The call of the dense decoder."""
        return {"forward": forward_of(dense)}

    def call_dense(self, **kwargs: Any) -> Any:
        output = self.dense_class.forward(self, **kwargs)
        loss = None
        if self.training and self.balancing_coefficient > 0:
            loss = self._balancing_loss(kwargs.get("attention_mask"))
        self.last_loss.output = loss
        hand_over(loss, self.training)
        return output

    def _balancing_loss(self, mask: Any) -> Tensor:
        losses = []
        for layer in self.layers:
            routing, shape = layer.mlp.routing, layer.mlp.num_active_experts.shape
            is_token = None
            if isinstance(mask, Tensor) and mask.dim() == 2:  # past columns are before the others
                is_token = mask[:, mask.shape[1] - shape[1] :].reshape(-1) != 0
            loss = routing.balancing_loss
            if is_token is not None:
                loss = expert_balancing_loss(routing.gates, routing.active, is_token)
            losses.append(loss)
        return self.balancing_coefficient * torch.stack(losses).mean()


class _LanguageModel(TellsLostLosses, Derived):
    """Before the class of a dense language model (`LlamaForCausalLM`): adds that loss."""

    config: Any

    @classmethod
    def attributes(cls, dense: Any) -> dict[str, Any]:
        """The call of the dense model."""
        return {"forward": forward_of(dense)}

    def call_dense(self, **kwargs: Any) -> Any:
        return_dict, items = kwargs.pop("return_dict", None), kwargs.get("num_items_in_batch")
        output = self.dense_class.forward(self, return_dict=True, **kwargs)
        balancing = self.get_decoder().last_loss.output  # type: ignore[attr-defined]
        labels = kwargs.get("labels")
        if labels is None:
            tell_lost(balancing, items)
        elif output.loss is not None and balancing is not None:
            count = num_targets(labels, kwargs.get("shift_labels"))
            output["loss"] = output.loss + batch_share(count, items) * balancing
            take_back(balancing)
        return output.to_tuple() if wants_tuple(return_dict, self.config) else output


def _layers(model: Any) -> list[Any]:
    """The decoder layers, each with an MLP that can be replaced."""
    decoder = model.get_decoder() if isinstance(model, PreTrainedModel) else None
    layers = getattr(decoder, "layers", None)
    if decoder is model or not layers:
        raise ValueError(
            "apply_dynamoe: expected a Transformers language model with decoder layers, got "
            f"{type(model).__name__}"
        )
    for layer in layers:
        mlp = getattr(layer, "mlp", None)
        if _weights(mlp) is None:
            raise ValueError(
                "apply_dynamoe: expected layers with an MLP of gate_proj, up_proj (or gate_up_proj)"
                f" and down_proj, got {type(layer).__name__} with {type(mlp).__name__}"
            )
    return list(layers)


def _weights(mlp: Any) -> tuple[Any, list[nn.Linear], nn.Linear] | None:
    """Activation, the maps up (gate first) and the map down of a gated MLP; None of others."""
    activation = getattr(mlp, "act_fn", getattr(mlp, "activation_fn", None))
    for names in (("gate_proj", "up_proj"), ("gate_up_proj",)):
        maps = [getattr(mlp, name, None) for name in (*names, "down_proj")]
        if all(isinstance(one, nn.Linear) for one in maps) and activation is not None:
            *up, down = maps
            return activation, up, down  # type: ignore[return-value]
    return None


@torch.no_grad()
def _mixture(mlp: nn.Module, count: int, init: str, std: float, options: dict[str, Any]) -> DynaMoE:
    """The experts that take the place of an MLP."""
    found = _weights(mlp)
    assert found is not None
    activation, up, down = found
    bias = down.bias is not None
    mixture = DynaMoE(
        down.out_features,
        down.in_features,
        count,
        gated=True,
        bias=bias,
        activation=activation,
        **{"std": std, **options},
    )
    experts = mixture.experts
    if init == "dense":
        experts.up_proj.copy_(torch.cat([one.weight for one in up]))
        experts.down_proj.copy_(down.weight)
        if experts.up_bias is not None and experts.down_bias is not None:
            experts.up_bias.copy_(torch.cat([one.bias for one in up]))
            experts.down_bias.copy_(down.bias)
    else:
        for weight in (experts.up_proj, experts.down_proj):
            nn.init.normal_(weight, std=std)
        for one in (experts.up_bias, experts.down_bias):
            if one is not None:
                nn.init.zeros_(one)
    return mixture.to(device=down.weight.device, dtype=down.weight.dtype)
