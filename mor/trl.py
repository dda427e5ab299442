"""Router losses for TRL, whose trainers compute the language-model loss without our forward."""

from typing import Any

from torch import Tensor, nn

from mor.models.modeling_mor import MoRModel, batch_share
from mor.models.outputs import MoRModelOutput
from mor.training import loss_scale

__all__ = ["RouterLossMixin"]


class RouterLossMixin:
    """Adds the weighted router losses to the loss of TRL's `SFTTrainer`.

    That trainer takes hidden states from the base model and computes its own loss on them, so the
    router losses that `MoRForCausalLM.forward` adds would be left out, without an error. Weighted
    as there: by the batch's share of `num_items_in_batch`. Evaluation is left as it is.

    Example:
        >>> class MoRSFTTrainer(RouterLossMixin, SFTTrainer):  # doctest: +SKIP
        ...     pass
    """

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """As the trainer, plus the router losses while the model trains.

        Raises:
            ValueError: a model without a `MoRModel` in it.
        """
        base = next((m for m in model.modules() if isinstance(m, MoRModel)), None)
        if base is None:
            raise ValueError(f"RouterLossMixin: expected a MoR model, got {type(model).__name__}")
        outputs: list[MoRModelOutput] = []
        hook = base.register_forward_hook(lambda module, args, output: outputs.append(output))
        try:
            result = super().compute_loss(  # type: ignore[misc]
                model, inputs, return_outputs, num_items_in_batch
            )
        finally:
            hook.remove()
        router_loss = outputs[0].router_loss
        if not model.training or router_loss is None:
            return result
        share = batch_share(inputs["labels"], num_items_in_batch)
        share = share * loss_scale(self, num_items_in_batch)
        loss = result[0] if return_outputs else result
        loss = loss + share * router_loss
        return (loss, *result[1:]) if return_outputs else loss
