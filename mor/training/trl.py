"""Router losses for TRL, whose trainers compute their losses without our forward."""

from typing import Any

from torch import Tensor, nn

from mor.models.modeling_mor import MoRModel
from mor.models.router_losses import collect_router_losses
from mor.models.swap.routed_layers import RoutedLayers
from mor.models.targets import batch_share, num_targets
from mor.training.trainer import loss_scale

__all__ = ["RouterLossMixin"]


class RouterLossMixin:
    """Adds the weighted router losses to the loss of TRL's trainers.

    `SFTTrainer`, `DPOTrainer`, `KTOTrainer`, `GRPOTrainer` and `RLOOTrainer` take hidden states
    from the decoder and compute their own loss on them, so the router losses that
    `MoRForCausalLM.forward` adds would be left out. The mixin stands before any of them, for MoR
    and swapped models, also inside PEFT. An optimizer step minimises the trainer's loss plus the
    mean router loss of its batches, whatever the accumulation: weighted by a batch's share of the
    targets where the trainer's loss is (SFT), equal for all batches elsewhere. Evaluation and
    reference models are left as they are.

    Example:
        >>> class MoRSFTTrainer(RouterLossMixin, SFTTrainer):  # doctest: +SKIP
        ...     pass
    """

    def create_accelerator_and_postprocess(self) -> None:
        """Tell DDP to look for no unused parameters, unless the arguments say to.

        It would search the graph of the output, which lacks the router losses, and take auxiliary
        routers for unused. No parameter is: every layer runs in every step.
        """
        arguments: Any = self.args  # type: ignore[attr-defined]
        if arguments.ddp_find_unused_parameters is None:
            arguments.ddp_find_unused_parameters = False
        super().create_accelerator_and_postprocess()  # type: ignore[misc]

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Add the router losses to the trainer's loss while the model trains.

        Raises:
            ValueError: a model without MoR layers in it, or a compiled one.
        """
        if not any(isinstance(module, MoRModel | RoutedLayers) for module in model.modules()):
            raise ValueError(f"RouterLossMixin: expected a MoR model, got {type(model).__name__}")
        labels = inputs.get("labels")
        with collect_router_losses() as collected:
            result = super().compute_loss(  # type: ignore[misc]
                model, inputs, return_outputs, num_items_in_batch
            )
        if not model.training:
            return result
        if collected.calls == 0:
            raise ValueError(
                "RouterLossMixin: expected a model that is not compiled: no router loss leaves "
                "compiled code beside the output; compile single layers instead"
            )
        router_loss = collected.mean()
        if router_loss is None:
            return result
        weight = self._weight(labels, num_items_in_batch)
        loss = (result[0] if return_outputs else result) + weight * router_loss
        return (loss, *result[1:]) if return_outputs else loss

    def _weight(self, labels: Tensor | None, num_items_in_batch: Tensor | int | None) -> Any:
        """Of a batch's router loss, before the Trainer divides by the accumulation (or not)."""
        trainer: Any = self
        scaled = trainer.loss_is_scaled_for_ga
        if scaled is None and labels is not None:
            share = batch_share(num_targets(labels), num_items_in_batch)
            return share * loss_scale(self, num_items_in_batch)
        return 1 / trainer.current_gradient_accumulation_steps if scaled else 1
