"""Token merging inside the transformer blocks of loaded diffusion models of diffusers.

Tokens merge before the self-attention of a block and get their results back behind it (tomesd), by
a share or by a threshold, with a plan made at every step or at some steps only (CA-ToMe).
"""

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mor.models.derived_class import Derived, derived_class
from mor.modules.token_merging import MergePlan, match, match_above, split_cells
from mor.ops.depth_attention import depth_attention

__all__ = ["CHECKPOINTS", "DiffusionMerging", "DiffusionOptions", "find_blocks", "merge_blocks"]

#: CA-ToMe's lists for 50 denoising steps, by the number of its configuration; 3 was the best.
CHECKPOINTS = {
    1: (0, 1, 2, 3, 5, 10, 15, 25, 35),
    2: (0, 10, 11, 12, 15, 20, 25, 30, 35, 45),
    3: (0, 8, 11, 13, 20, 25, 30, 35, 45, 46, 47, 48, 49),
    4: (0, 9, 13, 14, 15, 28, 29, 32, 36, 45),
}


@dataclass(frozen=True)
class DiffusionOptions:
    """The options of `mor.apply_token_merging` for diffusion models."""

    ratio: float | None = None
    threshold: float | None = None
    cell: tuple[int, int] = (2, 2)
    max_downsample: int = 1
    seed: int | None = 0
    checkpoints: Sequence[int] | None = None

    def __post_init__(self) -> None:
        def expect(good: bool, name: str, text: str) -> None:
            if not good:
                raise ValueError(
                    f"apply_token_merging: {name}: expected {text}, got {getattr(self, name)!r}"
                )

        if (self.ratio is None) == (self.threshold is None):
            raise ValueError(
                "apply_token_merging: expected either ratio or threshold for a diffusion model, "
                f"got ratio={self.ratio!r} and threshold={self.threshold!r}"
            )
        expect(self.ratio is None or 0 <= self.ratio < 1, "ratio", "a share in [0, 1)")
        expect(self.threshold is None or -1 <= self.threshold <= 1, "threshold", "a cosine")
        expect(
            len(self.cell) == 2 and min(self.cell) >= 1 and max(self.cell) > 1,
            "cell", "two positive numbers, not (1, 1)",
        )  # fmt: skip
        expect(self.max_downsample >= 1, "max_downsample", "a number from 1")
        if self.checkpoints is not None:
            expect(0 in self.checkpoints, "checkpoints", "steps, 0 among them")


class DiffusionMerging:
    """`model.token_merging` of a diffusion model: the options, and the plans of each request.

    With `checkpoints` every request must be announced by `start`; its plans are its own, and they
    are dropped behind its last call.
    """

    def __init__(self, options: DiffusionOptions, patch: int) -> None:
        self.options, self.patch = options, patch
        self.request: Hashable = None
        self.step = -1  # of the call that runs
        self._steps: dict[Hashable, tuple[int, int]] = {}  # calls so far, and in all
        self._plans: dict[Hashable, dict[int, MergePlan]] = {}
        self._size = (0, 0)
        self._cells: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

    def start(self, request: Hashable = None, num_calls: int = 50) -> None:
        """Begins a request, or begins it anew: the next calls of the model are its steps.

        Args:
            request: any name; several may run in turn, see `resume`.
            num_calls: how often it calls the model: its denoising steps, for most schedulers.
        """
        if num_calls < 1:
            raise ValueError(f"start: num_calls: expected a number from 1, got {num_calls}")
        self.request = request
        self._steps[request] = (0, num_calls)
        self._plans.pop(request, None)

    def resume(self, request: Hashable) -> None:
        """The next calls of the model are steps of this request, which `start` began before."""
        if request not in self._steps:
            raise ValueError(f"resume: expected a request that start began, got {request!r}")
        self.request = request

    def begin_call(self, height: int, width: int) -> None:
        """Notes the size of the image and counts the step."""
        self._size, self._cells = (height // self.patch, width // self.patch), {}
        if self.request not in self._steps:
            if self.options.checkpoints is not None:
                raise ValueError(
                    "token merging: expected model.token_merging.start(request, num_calls) before "
                    "a request's first step, since its plans are kept for later steps"
                )
            self.step += 1
            return
        self.step, num_calls = self._steps[self.request]
        self._steps[self.request] = (self.step + 1, num_calls)

    def end_call(self) -> None:
        """Drops the plans of a request behind its last call."""
        done, num_calls = self._steps.get(self.request, (0, 1))
        if done >= num_calls:
            del self._steps[self.request]
            self._plans.pop(self.request, None)

    def plan(self, block: int, x: Tensor) -> MergePlan | None:
        """The plan of a block for this step; None where the block does not merge.

        Args:
            block: its number.
            x: [B, N, D] what comes into the block.
        """
        height, width = self._size
        scale = math.ceil(math.sqrt(height * width // x.shape[1]))
        if scale > self.options.max_downsample:
            return None
        height, width = math.ceil(height / scale), math.ceil(width / scale)
        if height * width != x.shape[1]:
            raise ValueError(
                f"token merging: expected {height} x {width} tokens in block {block}, got "
                f"{x.shape[1]}"
            )
        if height < self.options.cell[0] or width < self.options.cell[1]:
            return None
        checkpoints, plans = self.options.checkpoints, self._plans.setdefault(self.request, {})
        kept = plans.get(block)
        if (
            kept is not None
            and checkpoints is not None
            and self.step not in checkpoints
            and kept.segments.shape[0] == x.shape[0] * x.shape[1]
            and kept.segments.device == x.device
        ):
            return kept
        plan = self._make_plan(x, height, width)
        if checkpoints is not None and plan is not None:
            plans[block] = plan
        return plan

    def _make_plan(self, x: Tensor, height: int, width: int) -> MergePlan | None:
        options = self.options
        if (height, width) not in self._cells:
            across = width // options.cell[1]
            cells = torch.arange(height // options.cell[0] * across, device=x.device)
            choice = _hashed(cells, options, self.step).view(-1, across)
            self._cells[height, width] = split_cells(height, width, options.cell, choice)
        split = self._cells[height, width]
        if options.threshold is not None:
            return match_above(x, options.threshold, *split)
        r = min(int(x.shape[1] * (options.ratio or 0)), split[0].shape[0])
        return match(x, r, *split) if r else None

    def undo(self, model: Any) -> None:
        """Gives the model, its blocks and their attentions their own classes back."""
        for block in find_blocks(model):
            for module in (block, block.attn1):
                module.__class__ = module.dense_class
                del module.token_merging
            del block.block_index, block.attn1.plan
        model.__class__ = model.dense_class
        del model.token_merging


def _hashed(cells: Tensor, options: DiffusionOptions, step: int) -> Tensor:
    """The destination in each cell: the first without a seed, else by seed, step and cell.

    A hash instead of a generator: it has no state that one request could change for another, it is
    the same on every device, and it compiles.
    """
    if options.seed is None:
        return torch.zeros_like(cells)
    x = cells + (step + 1) * 1_000_003 + options.seed * 7_368_787
    for factor in (0x2C1B3C6D, 0x297A2D39):
        x = ((x ^ (x >> 15)) * factor) & 0x7FFFFFFF
    return (x >> 7) % (options.cell[0] * options.cell[1])


def find_blocks(model: nn.Module) -> list[Any]:
    """The transformer blocks of a diffusers model with self-attention of their own."""
    return [
        module
        for module in model.modules()
        if any(parent.__name__ == "BasicTransformerBlock" for parent in type(module).__mro__)
        and not module.only_cross_attention
    ]


def merge_blocks(model: nn.Module, options: DiffusionOptions) -> DiffusionMerging:
    """Puts merging around the self-attention of every block of a diffusers model."""
    patch = getattr(model.config, "patch_size", None) or 1
    blocks = find_blocks(model)
    for index, block in enumerate(blocks):
        for name in ("group_norm", "spatial_norm", "norm_q", "norm_k"):
            if options.threshold is not None and getattr(block.attn1, name, None) is not None:
                raise ValueError(
                    f"apply_token_merging: threshold: expected self-attention without {name} in "
                    f"block {index}; use ratio"
                )
    state = DiffusionMerging(options, patch)
    model.__class__ = derived_class(MergingModel, type(model))
    for index, block in enumerate(blocks):
        block.block_index = index
        for module, behaviour in ((block, MergingBlock), (block.attn1, MergingSelfAttention)):
            module.__class__ = derived_class(behaviour, type(module))
            module.__dict__["token_merging"] = state
        block.attn1.plan = None
    return state


class MergingModel(Derived):
    """Goes before the class of a diffusion model: tells the blocks about the image and the step."""

    token_merging: DiffusionMerging

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own forward."""
        sample: Any = args[0] if args else kwargs.get("sample", kwargs.get("hidden_states"))
        self.token_merging.begin_call(*sample.shape[-2:])
        output = super().forward(*args, **kwargs)  # type: ignore[misc]
        self.token_merging.end_call()
        return output


class MergingBlock(Derived):
    """Goes before the class of a block: plans the merge by what comes into the block."""

    token_merging: DiffusionMerging

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The block's own forward."""
        plan = self.token_merging.plan(self.block_index, hidden_states)  # type: ignore[attr-defined]
        self.attn1.plan = plan  # type: ignore[attr-defined]
        return super().forward(hidden_states, *args, **kwargs)  # type: ignore[misc]


class MergingSelfAttention(Derived):
    """Goes before the class of a self-attention: attends on the merged tokens."""

    plan: MergePlan | None
    token_merging: DiffusionMerging

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """[B, N, D] to [B, N, D]."""
        plan, self.plan = self.plan, None
        if plan is None:
            return super().forward(hidden_states, *args, **kwargs)  # type: ignore[misc]
        if kwargs.get("attention_mask") is not None:
            raise ValueError("token merging: expected self-attention without a mask, got one")
        x = plan.merge(hidden_states)
        if self.token_merging.options.threshold is not None:
            return plan.unmerge(self._attend_ragged(x, plan))
        x = x.view(hidden_states.shape[0], -1, x.shape[-1])
        y = super().forward(x, *args, **kwargs)  # type: ignore[misc]
        return plan.unmerge(y.flatten(0, 1))

    def _attend_ragged(self, x: Tensor, plan: MergePlan) -> Tensor:
        """Attention inside each sequence of packed rows: [num_rows, D] to [num_rows, D]."""
        attention: Any = self
        q, k, v = (
            project(x).view(x.shape[0], attention.heads, -1)
            for project in (attention.to_q, attention.to_k, attention.to_v)
        )
        positions = torch.zeros(x.shape[0], dtype=torch.int64, device=x.device)
        y, _ = depth_attention(
            q, k, v, positions, positions, plan.cu_seqlens, plan.cu_seqlens, causal=False,
            scale=attention.scale,
        )  # fmt: skip
        for module in attention.to_out:
            y = module(y.flatten(1) if y.dim() == 3 else y)
        return y / attention.rescale_output_factor
