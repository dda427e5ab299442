"""One forward call of decoder layers on packed rows, for a model and for a swapped block."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mor.models.attention import AttentionContext, SharedKV
from mor.models.cache import Placement, RecursionCacheLayer
from mor.models.schedule import Schedule
from mor.modules.expert_choice import ExpertChoice
from mor.modules.layer_pass import LayerPass
from mor.modules.packing import PackedBatch, Packing
from mor.modules.recursion import RecursionOutput
from mor.modules.token_choice import TokenChoice
from mor.ops.gather_tokens import gather_tokens

__all__ = ["DecoderPass", "Rotary"]

Rotary = Mapping[str | None, tuple[Tensor, Tensor]]
"""Rotary cos and sin [1, N, head_dim] for each kind of layer that has angles of its own."""


@dataclass(frozen=True)
class _Rows:
    """Rows [K] that run some layers together, and what is found out once for all these layers.

    Attributes:
        packing: their sequences and positions.
        angles: rotary cos and sin at their positions.
        indices: [K] where they stand among all rows; None if no layer asks for it.
        placement: where they go in the layers' caches.
    """

    packing: Packing
    angles: Rotary
    indices: Tensor | None
    placement: Placement


class DecoderPass(LayerPass):
    """Decoder layers of a Transformers model during one forward call.

    Args:
        layers: the unique layers.
        schedule: which of them runs at which depth.
        batch: how the batch was packed.
        angles: rotary cos and sin of all rows.
        caches: of each depth; None without a cache.
        keep_states: keep the states [N, D] after each depth, in `states`.
        rotary_types: which of the angles each unique layer takes; default the only ones.
        encoding: [E, D] factors on the outputs of `schedule.encoded_depths`.
        arguments: further arguments of the layers.
    """

    def __init__(
        self,
        layers: nn.ModuleList,
        schedule: Schedule,
        batch: PackedBatch,
        angles: Rotary,
        caches: Sequence[RecursionCacheLayer] | None,
        *,
        keep_states: bool = False,
        rotary_types: Sequence[str | None] | None = None,
        encoding: Tensor | None = None,
        arguments: Mapping[str, Any] | None = None,
    ) -> None:
        self.layers, self.schedule, self.batch = layers, schedule, batch
        self.angles, self.caches, self.encoding = angles, caches, encoding
        self.rotary_types = rotary_types or [None] * len(layers)
        self.arguments = arguments or {}
        self.keep_states = keep_states
        self.states: list[Tensor] = []
        self._kept_in_step: dict[int, list[Tensor]] = {}
        self._shared: dict[int, SharedKV] = {}

    def run_all(
        self, hidden: Tensor, recursion: ExpertChoice | TokenChoice | None, generating: bool
    ) -> tuple[Tensor, RecursionOutput]:
        """All depths of a model on all rows [N, D]; `recursion` None: every token takes all."""
        shared, everyone = self.schedule.shared_depths, self._rows(self.batch.packing)
        hidden = self._run_depths(range(shared.start), hidden, everyone, self.states)
        if recursion is not None:
            routing = self.run_routed(hidden, recursion, generating)
        else:
            hidden = self._run_depths(shared, hidden, everyone, self.states)
            depths = torch.full_like(self.batch.packing.positions, self.schedule.num_recursions)
            routing = RecursionOutput(hidden, depths)
        last = range(shared.stop, len(self.schedule.layers))
        return self._run_depths(last, routing.hidden, everyone, self.states), routing

    def run_routed(
        self, hidden: Tensor, recursion: ExpertChoice | TokenChoice, generating: bool
    ) -> RecursionOutput:
        """The shared block on the rows that a router keeps of all rows [N, D]."""
        routing: RecursionOutput = recursion(
            hidden, self.batch.packing, self, self.keep_states, generating
        )
        if self.keep_states:
            self.states += self._states_of_all_tokens(routing)
        return routing

    def __call__(self, x: Tensor, packing: Packing, step: int, rows: Tensor) -> Tensor:
        """One recursion step of rows [K, D]."""
        if torch.compiler.is_compiling() and packing.lengths is None:
            # One graph must do with and without rows: a dummy row stands after all tokens.
            return self.run(x, packing, step, rows, with_dummy=True)
        out = super().__call__(x, packing, step, rows)
        if x.shape[0] == 0 and self.schedule.kv_strategy == "hybrid":
            self._keep_shared_keys(step)
        return out

    def run(
        self, x: Tensor, packing: Packing, step: int, rows: Tensor, with_dummy: bool = False
    ) -> Tensor:
        """The layers of a step on rows [K, D] at depths of `schedule.step(step)`."""
        at = rows
        if with_dummy:
            x, packing, at = self._add_dummy_row(x, packing, rows)
        kept = self._kept_in_step.setdefault(step, [])
        x = self._run_depths(self.schedule.step(step), x, self._rows(packing, at, rows), kept)
        if with_dummy:
            x, kept[:] = x[:-1], [state[:-1] for state in kept]
        return x

    def run_dummy_row(self, x: Tensor, step: int) -> Tensor:
        """The layers of a step on a row [1, D] that attends to itself, at no angle."""
        packing = Packing.uniform(1, 1, self.batch.packing.positions.new_zeros(1))
        angles = {
            kind: (cos.new_ones(1, 1, cos.shape[-1]), sin.new_zeros(1, 1, sin.shape[-1]))
            for kind, (cos, sin) in self.angles.items()
        }
        for depth in self.schedule.step(step):
            context = AttentionContext(packing, use=self.schedule.uses[depth])
            x = self._run_layer(depth, x, angles, context)
        return x

    def _rows(
        self, packing: Packing, at: Tensor | None = None, indices: Tensor | None = None
    ) -> _Rows:
        """Rows of a packing, which stand `at` these places among all rows (default: all rows)."""
        angles = self.angles
        if packing is not self.batch.packing:
            assert at is not None
            angles = {
                kind: (
                    gather_tokens(cos[0], at).unsqueeze(0),
                    gather_tokens(sin[0], at).unsqueeze(0),
                )
                for kind, (cos, sin) in angles.items()
            }
        if indices is None and self.schedule.kv_strategy == "hybrid":
            indices = torch.arange(packing.num_rows, device=packing.positions.device)
        return _Rows(packing, angles, indices, Placement(self.batch.shape[1]))

    def _run_depths(self, depths: range, x: Tensor, rows: _Rows, kept: list[Tensor]) -> Tensor:
        for depth in depths:
            x = self._run_layer(depth, x, rows.angles, self._context(depth, rows))
            if self.keep_states:
                kept.append(x)
        return x

    def _context(self, depth: int, rows: _Rows) -> AttentionContext:
        """What the layer of a depth attends over."""
        schedule = self.schedule
        unique, use = schedule.layers[depth], schedule.uses[depth]
        reuses = not schedule.computes_kv(depth)
        shared = overwritten = None
        if schedule.kv_strategy != "recursion":
            if use == 0:
                self._shared[unique] = SharedKV(self.batch.packing)
            elif not reuses:
                overwritten = rows.indices
            shared = self._shared[unique]
        cache = None if self.caches is None else self.caches[depth]
        return AttentionContext(
            rows.packing, cache, rows.placement, shared, reuses, overwritten, use
        )

    def _run_layer(
        self, depth: int, x: Tensor, angles: Rotary, context: AttentionContext
    ) -> Tensor:
        """The layer of one depth on rows [K, D], and the recursion encoding where a block ends."""
        unique = self.schedule.layers[depth]
        out = self.layers[unique](
            x.unsqueeze(0),
            position_embeddings=angles[self.rotary_types[unique]],
            mor_context=context,
            **self.arguments,
        )
        x = (out[0] if isinstance(out, tuple) else out).squeeze(0)
        encoded = self.schedule.encoded_depths
        if self.encoding is None or depth not in encoded:
            return x
        return x * self.encoding[encoded.index(depth)].to(x.dtype)

    def _keep_shared_keys(self, step: int) -> None:
        """Append what the first uses computed: the hybrid cache of a later use has all tokens."""
        placement = Placement(self.batch.shape[1])
        for depth in self.schedule.step(step) if self.caches is not None else ():
            shared = self._shared[self.schedule.layers[depth]]
            assert self.caches is not None
            assert shared.keys is not None and shared.values is not None
            self.caches[depth].append(shared.keys, shared.values, shared.packing, placement)

    def _add_dummy_row(
        self, x: Tensor, packing: Packing, rows: Tensor
    ) -> tuple[Tensor, Packing, Tensor]:
        """One more row, of zeros, after all tokens, so that no token attends to it."""
        ends, after = packing.cu_seqlens, self.batch.packing.positions.max().unsqueeze(0) + 1
        ends = torch.cat([ends[:-1], ends[-1:] + 1])
        positions = torch.cat([packing.positions, after])
        x = torch.cat([x, x.new_zeros(1, x.shape[1])])
        return x, Packing(ends, positions), torch.cat([rows, rows.new_zeros(1)])

    def _states_of_all_tokens(self, routing: RecursionOutput) -> list[Tensor]:
        """States [N, D] after each layer of each step; inactive tokens show the state before it."""
        states = []
        for index, step in enumerate(routing.steps):
            assert step.before is not None and step.after is not None
            inner = self._kept_in_step.get(index, [])[:-1]
            states += [step.before.index_copy(0, step.rows, x) for x in inner]
            states += [step.before] * (self.schedule.block_depth - 1 - len(inner))
            states.append(step.after)
        return states
