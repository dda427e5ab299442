"""One forward call of the unrolled layers: packing, caches and shared keys."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from mor.models.attention import AttentionContext, SharedKV
from mor.modules.packing import PackedBatch, Packing
from mor.modules.recursion import RecursionOutput
from mor.ops.gather_tokens import gather_tokens

if TYPE_CHECKING:
    from mor.models.modeling_mor import MoRModel

__all__ = ["UnrolledLayers", "states_of_all_tokens"]

Rotary = dict[str | None, tuple[Tensor, Tensor]]
"""Rotary cos and sin [1, K, head_dim] for each of the model's `rotary_types`."""


class UnrolledLayers:
    """The layers of a model during one forward call: packing, cache and shared keys."""

    def __init__(
        self,
        model: "MoRModel",
        hidden: Tensor,
        batch: PackedBatch,
        cache: Cache | None,
    ) -> None:
        self.model, self.packing = model, batch.packing
        self.caches = cache.layers if cache is not None else [None] * len(model.schedule)
        self.longest = batch.shape[1]
        self.strategy = model.config.kv_strategy
        self.uses = model.uses
        self.shared: dict[int, SharedKV] = {}

        # Once for all recursions: angles of some rotary types depend on the length of the call.
        at = hidden.unsqueeze(0), self.packing.positions.unsqueeze(0)
        self.angles: Rotary = {
            kind: model.rotary_emb(*at, *([] if kind is None else [kind]))
            for kind in dict.fromkeys(model.rotary_types)
        }

    def rotary(self, rows: Tensor) -> Rotary:
        """Rotary cos and sin of some rows, at their original positions."""
        return {
            kind: (
                gather_tokens(cos[0], rows).unsqueeze(0),
                gather_tokens(sin[0], rows).unsqueeze(0),
            )
            for kind, (cos, sin) in self.angles.items()
        }

    def run(
        self,
        depth: int,
        x: Tensor,
        packing: Packing,
        rotary: Rotary,
        rows: Tensor | None = None,
    ) -> Tensor:
        """The layer of one unrolled depth on rows [K, D], `rows` of all N (default: all)."""
        unique = self.model.schedule[depth]
        shared, reuses, overwritten = None, False, None
        if self.strategy != "recursion":
            first_use = self.model.schedule.index(unique) == depth
            if first_use:
                self.shared[unique] = SharedKV(self.packing)
            shared = self.shared[unique]
            reuses = not first_use and self.strategy == "shared"
            if not first_use and self.strategy == "hybrid":
                overwritten = rows
                if rows is None:
                    overwritten = torch.arange(x.shape[0], device=x.device)
        context = AttentionContext(
            packing, self.caches[depth], self.longest, shared, reuses, overwritten, self.uses[depth]
        )
        out = self._layer(unique, x, rotary, context)
        return self._encode(depth, out)

    def run_without_rows(self, x: Tensor, depths: range) -> Tensor:
        """A step that no token takes: its layers run on one row of zeros, whose result is dropped.

        Every process must call every layer, or FSDP and DDP wait for gradients that never come;
        and Transformers' layers cannot reshape zero rows.
        """
        row = x.new_zeros(1, x.shape[1]) + 0 * x.sum()
        packing = Packing.uniform(1, 1, self.packing.positions.new_zeros(1))
        rotary = self.rotary(packing.positions)
        for depth in depths:
            unique = self.model.schedule[depth]
            context = AttentionContext(packing, use=self.uses[depth])
            row = self._encode(depth, self._layer(unique, row, rotary, context))
            cache = self.caches[depth]
            if self.strategy == "hybrid" and cache is not None:
                shared = self.shared[unique]
                cache.append(shared.keys, shared.values, self.packing, self.longest)
        return row[:0]

    def _encode(self, depth: int, x: Tensor) -> Tensor:
        """Recursion encoding: a vector of its own on the output of every recursion's block."""
        encoding = self.model.recursion_encoding
        if encoding is None or depth not in self.model.encoded_depths:
            return x
        return x * encoding[self.model.encoded_depths.index(depth)].to(x.dtype)

    def add_dummy_row(
        self, x: Tensor, packing: Packing, rows: Tensor
    ) -> tuple[Tensor, Packing, Tensor]:
        """One more row, of zeros, after all tokens, so that no token attends to it.

        For torch.compile, whose one graph must do with and without rows; see `run_without_rows`.
        """
        ends, after = packing.cu_seqlens, self.packing.positions.max().unsqueeze(0) + 1
        ends = torch.cat([ends[:-1], ends[-1:] + 1])
        positions = torch.cat([packing.positions, after])
        x = torch.cat([x, x.new_zeros(1, x.shape[1])])
        return x, Packing(ends, positions), torch.cat([rows, rows.new_zeros(1)])

    def _layer(self, unique: int, x: Tensor, rotary: Rotary, context: AttentionContext) -> Tensor:
        angles = rotary[self.model.rotary_types[unique]]
        out = self.model.layers[unique](
            x.unsqueeze(0), position_embeddings=angles, mor_context=context
        )
        return (out[0] if isinstance(out, tuple) else out).squeeze(0)


def states_of_all_tokens(
    routing: RecursionOutput, outputs: list[list[Tensor]], block_depth: int
) -> list[Tensor]:
    """States [N, D] after each layer of each step; inactive tokens show the state before it."""
    states = []
    for index, step in enumerate(routing.steps):
        assert step.before is not None and step.after is not None
        inner = outputs[index] if index < len(outputs) else []
        states += [step.before.index_copy(0, step.rows, x) for x in inner[:-1]]
        states += [step.before] * (block_depth - 1 - len(inner[:-1]))
        states.append(step.after)
    return states
