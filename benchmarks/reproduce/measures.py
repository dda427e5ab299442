"""What is measured on trained models, beside the loss."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from mor.data.tokens import TokenBlocks
from mor.modules import ExpertChoice
from mor.training.race_results import ModelResult, at_median_speed
from mor.training.trainer import MoRTrainer

__all__ = [
    "compare_times",
    "measure_depths",
    "measure_leak",
    "measure_memory",
    "measure_routing",
    "measure_scaling",
    "unigram_loss",
]

#: Blocks of the training text whose tokens `unigram_loss` counts.
_COUNTED = 4096
_CLASSES = "space", "word", "number", "punctuation"


def measure_leak(trainer: MoRTrainer) -> dict[str, float]:
    """The loss where routing ranks whole sequences, and how many tokens each way selects.

    The same model and the same rows; only `eval_routing` differs. The shares tell how far the
    threshold is from the trained capacities: without that, a gap is not all leak.
    """
    config = trainer.model.config
    if getattr(config, "router", None) != "expert":
        return {}
    routers = [module for module in trainer.model.modules() if isinstance(module, ExpertChoice)]
    losses, shares = {}, {}
    for routing in ("topk", "threshold"):
        config.eval_routing = routing
        for router in routers:  # they took the option when they were built
            router.eval_routing = routing
        losses[routing] = trainer.evaluate()["eval_loss"]
        shares[routing] = measure_routing(trainer)["recursions"]
    return {
        "topk_loss": losses["topk"],
        "leak": losses["threshold"] - losses["topk"],
        "recursions_causal": shares["threshold"],
        "recursions_topk": shares["topk"],
    }


def measure_routing(trainer: MoRTrainer) -> dict[str, float]:
    """Routing of the held-out rows, as the last evaluation logged it: nothing is run.

    Returns:
        `recursions`, the mean of a token; `dead_tokens`, `entropy` and, for token-choice,
        `max_vio`, as `mor.modules.RoutingMetrics` defines them. Empty without a router.
    """
    line = next(line for line in reversed(trainer.state.log_history) if "eval_loss" in line)
    shares = [value for name, value in line.items() if name.startswith("eval_selected_share_")]
    if not shares:
        return {}
    names = [name for name in ("dead_tokens", "entropy", "max_vio") if f"eval_{name}" in line]
    return {"recursions": sum(shares), **{name: line[f"eval_{name}"] for name in names}}


@torch.no_grad()
def measure_depths(trainer: MoRTrainer) -> dict[str, float]:
    """`measure_routing`, and the mean recursions of the tokens of each class.

    Returns:
        also `depth_space`, `depth_word`, `depth_number`, `depth_punctuation`.
    """
    routing = measure_routing(trainer)
    if not routing:
        return {}
    tokenizer = trainer.processing_class
    assert isinstance(tokenizer, PreTrainedTokenizerBase)
    classes = _token_classes(tokenizer).to(trainer.args.device)
    counts, sums = torch.zeros(2, len(_CLASSES), dtype=torch.float64, device=classes.device)
    trainer.model.eval()
    for batch in trainer.get_eval_dataloader():
        ids = batch["input_ids"].to(classes.device)
        depths = trainer.model(input_ids=ids, use_cache=False).token_depths
        kinds = classes[ids].reshape(-1)
        counts += torch.bincount(kinds, minlength=len(_CLASSES))
        sums += torch.bincount(kinds, depths.double().reshape(-1), minlength=len(_CLASSES))
    counts, sums = trainer.accelerator.reduce(torch.stack([counts, sums]))  # over the processes
    means = zip(_CLASSES, sums.tolist(), counts.tolist(), strict=True)
    return routing | {f"depth_{name}": total / n for name, total, n in means if n}


def _token_classes(tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """[V] the index in `_CLASSES` of every token."""

    def kind(text: str) -> str:
        text = text.strip().replace("_", "a")  # part of a name
        if not text:
            return "space"
        if text.isdecimal():
            return "number"
        return "word" if text.isalnum() else "punctuation"

    texts = (tokenizer.decode([token]) for token in range(len(tokenizer)))
    return torch.tensor([_CLASSES.index(kind(text)) for text in texts])


def measure_scaling(trainer: MoRTrainer) -> dict[str, float]:
    """The loss of an expert-choice model that stops after 1, 2, ..., R recursions.

    Returns:
        `loss_after_1`, ...; the last one is the model's own loss.
    """
    router = trainer.model.model.recursion
    assert isinstance(router, ExpertChoice)
    routers, losses = router.routers, {}
    for count in range(1, len(routers) + 1):
        router.routers = routers[:count]
        losses[f"loss_after_{count}"] = trainer.evaluate()["eval_loss"]
    return losses


def measure_memory(trainer: MoRTrainer) -> dict[str, float]:
    """What a training step must hold when its forward ends, in MiB.

    Weights, gradients and the two moments of AdamW, and every tensor that autograd keeps for the
    backward of one batch; counted, so that it is the same on every machine.
    """
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    weights = {p.untyped_storage().data_ptr(): p.nbytes for p in trainer.model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    trainer.model.train()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = trainer.compute_loss(trainer.model, batch)
        held = sum(kept.values())
        del loss
    return {"memory_mib": (4 * sum(weights.values()) + held) / 2**20}


def unigram_loss(train: TokenBlocks, held_out: TokenBlocks, vocab_size: int) -> float:
    """The loss of a model that knows only how often each token occurs; what is to be beaten.

    Args:
        train: whose first blocks are counted, each token once more than it occurs.
        held_out: whose mean loss is taken, in nats per token.
        vocab_size: V.
    """
    first = [train[i]["input_ids"] for i in range(min(len(train), _COUNTED))]
    shares = torch.bincount(torch.cat(first), minlength=vocab_size).double() + 1
    logs = (shares / shares.sum()).log()
    return -float(torch.stack([logs[block["input_ids"]].mean() for block in held_out]).mean())


def compare_times(results: Sequence[ModelResult]) -> list[dict[str, float]]:
    """Seconds of each training, and its loss when the fastest one had ended.

    Both at the median speed of the turns. The loss is interpolated between evaluations.
    """
    curves = [at_median_speed(result) for result in results]
    ends = min(curve[-1].seconds for curve in curves)
    return [
        {
            "seconds": curve[-1].seconds,
            "loss_at_equal_time": float(
                np.interp(ends, [p.seconds for p in curve], [p.loss for p in curve])
            ),
        }
        for curve in curves
    ]
