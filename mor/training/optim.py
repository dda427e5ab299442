"""Parameter groups of a model, for any optimizer."""

from typing import Any

from torch import nn

__all__ = ["parameter_groups"]


def parameter_groups(
    model: nn.Module, weight_decay: float = 0.1, aux_router_learning_rate: float | None = None
) -> list[dict[str, Any]]:
    """Parameter groups for any optimizer of torch.

    The auxiliary routers of expert-choice (`router_aux="router"`) learn from detached states and
    give nothing to the rest of the model. As AdamW treats each parameter on its own, a group with
    its own learning rate is the separate optimizer that the authors give them, but for gradient
    clipping, whose norm includes them.

    Args:
        model: a MoR model; one without auxiliary routers has the first two groups.
        weight_decay: of matrices and embeddings; vectors and recursion encodings have none.
        aux_router_learning_rate: of the auxiliary routers; None leaves them with the rest.

    Returns:
        Groups of parameters that are trained, none of them empty.

    Raises:
        ValueError: a rate for auxiliary routers the model does not have.

    Reference: MoR paper, section 2.2.1 (auxiliary router).
    """
    groups: list[dict[str, Any]] = [
        {"params": [], "weight_decay": weight_decay},
        {"params": [], "weight_decay": 0.0},
        {"params": [], "weight_decay": weight_decay, "lr": aux_router_learning_rate},
    ]
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if aux_router_learning_rate is not None and ".aux_routers." in f".{name}":
            group = 2
        else:
            group = int(parameter.dim() < 2 or name.endswith("recursion_encoding"))
        groups[group]["params"].append(parameter)
    if aux_router_learning_rate is not None and not groups[2]["params"]:
        raise ValueError(
            "parameter_groups: aux_router_learning_rate needs a model with auxiliary routers "
            "(MoRConfig's router_aux='router', or aux='router')"
        )
    return [group for group in groups if group["params"]]
