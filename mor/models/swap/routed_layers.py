"""Decoder layers of a Transformers model as one routed block: what `mor.swap` puts in."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.utils.output_capturing import _active_collector

from mor.models.cache import RecursionCacheLayer, recursion_layers
from mor.models.layer_pass import DecoderPass
from mor.models.outputs import MoRModelOutput
from mor.models.schedule import Schedule
from mor.modules.expert_choice import ExpertChoice
from mor.modules.packing import PackedBatch, pack
from mor.modules.recursion import LastRouting, RecursionOutput
from mor.modules.recursion_options import recursion_with
from mor.modules.token_choice import TokenChoice

__all__ = ["RoutedLayers", "SwapCall", "pack_call", "record_states"]


class SwapCall:
    """One forward call of a swapped model, from its arguments to its output.

    Not a dataclass: FSDP2 rebuilds those that reach a sharded layer, and a copy would take what the
    layer notes.

    Args:
        generating: see `ExpertChoice.forward`.

    Attributes:
        attention_mask: [B, S] or [B, past + S] as the caller gave it.
        generating: see `ExpertChoice.forward`.
        described: the caller gave position_ids.
        batch: how the tokens are packed, found by the first routed block for all.
        routings: of each routed block, by its first slot.
        token_depths: [B, S] recursion steps that each token took, in all blocks; 0 for pads.
        output: of the decoder.
    """

    def __init__(self, generating: bool = False) -> None:
        self.attention_mask: Tensor | None = None
        self.generating, self.described = generating, False
        self.batch: PackedBatch | None = None
        self.routings: dict[int, RecursionOutput] = {}
        self.token_depths: Tensor | None = None
        self.output: MoRModelOutput | None = None

    def add(self, slot: int, routing: RecursionOutput, token_depths: Tensor) -> None:
        """Notes the routing of a block; a recomputation of it changes nothing."""
        if slot in self.routings:
            return
        self.routings[slot] = routing
        if self.token_depths is not None:
            token_depths = token_depths + self.token_depths.to(token_depths.device)
        self.token_depths = token_depths

    @property
    def routing(self) -> RecursionOutput | None:
        """Of the only block; of several, their steps one after another and the sums of the rest."""
        routings = [*self.routings.values()]
        if len(routings) < 2:
            return routings[0] if routings else None
        hidden = routings[-1].hidden

        def total(name: str) -> Tensor | None:
            values = [getattr(routing, name) for routing in routings]
            found = [value.to(hidden.device) for value in values if value is not None]
            return torch.stack(found).sum(dim=0) if found else None

        depths = total("depths")
        assert depths is not None
        return RecursionOutput(
            hidden,
            depths,
            aux_loss=total("aux_loss"),
            z_loss=total("z_loss"),
            steps=[step for routing in routings for step in routing.steps],
        )


class RoutedLayers(nn.Module):
    """Decoder layers of a Transformers model, run up to R times on the tokens a router keeps.

    It stands where one decoder layer stood and takes what that takes. Inside, tokens are packed and
    attention is `depth_attention`; the layers' entries of the model's cache become recursion-wise
    ones when a cache is first used.

    Args:
        layers: the layers of the shared block.
        config: the dense model's configuration.
        slots: index in the model's cache of each layer in each recursion, R times as many as
            layers; those past the model's own are added to the cache.
        num_recursions: the number R.
        router: "expert" or "token".
        where: begins the errors: the function that put the block in.
        **options: of `ExpertChoice` or `TokenChoice`.

    Attributes:
        routing: the `RecursionOutput` of this thread's last call.
    """

    where = "swap"  # of models pickled before there was another

    def __init__(
        self,
        layers: Sequence[nn.Module],
        config: Any,
        slots: Sequence[int],
        num_recursions: int,
        router: str,
        *,
        where: str = "swap",
        **options: Any,
    ) -> None:
        super().__init__()
        self.where = where
        self.layers = nn.ModuleList(layers)
        self.slots, self.num_dense_layers = tuple(slots), config.num_hidden_layers
        if router not in ("expert", "token"):
            raise ValueError(
                f"swap: expected router to be expert or token, got {router!r}; for recursion "
                "without a router, MoRForCausalLM.from_dense(model, router=None)"
            )
        recursion = recursion_with(where, router, config.hidden_size, num_recursions, options)
        assert recursion is not None
        self.recursion: ExpertChoice | TokenChoice = recursion
        attention = copy.deepcopy(config)
        attention._attn_implementation = "mor"
        for layer in self.layers:
            layer.get_submodule("self_attn").config = attention
        self._last = LastRouting()

    @property
    def schedule(self) -> Schedule:
        """Which of the layers runs at which depth of the block."""
        num_recursions = len(self.slots) // len(self.layers)
        return Schedule.of_block(len(self.layers), num_recursions, self.slots)

    @property
    def routing(self) -> RecursionOutput | None:
        """The `RecursionOutput` of this thread's last call."""
        return self._last.output

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = False,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        mor_call: SwapCall | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """As a decoder layer: [B, S, D] to [B, S, D].

        Args:
            hidden_states: [B, S, D].
            attention_mask: what the model made of its mask; not used, see `SwapCall`.
            position_ids: [B or 1, S].
            past_key_values: the model's cache.
            use_cache: not used.
            position_embeddings: cos and sin [B or 1, S, head_dim].
            mor_call: what this call of the model knows; gets its routing.
            **kwargs: passed to the layers.
        """
        assert position_embeddings is not None, "expected a model with rotary positions"
        if "cache" in kwargs:  # its keys are read and written past `past_key_values`
            raise NotImplementedError(
                f"{self.where}: generate_batch has no place for tokens that exit early; use "
                "generate()"
            )
        call = SwapCall() if mor_call is None else mor_call
        batch_size = hidden_states.shape[0]
        caches = None
        if past_key_values is not None:
            caches = recursion_layers(
                past_key_values, self.schedule.caches, self.num_dense_layers, self.where
            )
        batch = call.batch
        if batch is None or batch.packing.positions.device != hidden_states.device:
            batch = call.batch = self._pack(hidden_states, position_ids, caches, call)
        cos, sin = (batch.pack(x.expand(batch_size, *x.shape[1:])) for x in position_embeddings)
        captured = _active_collector.get()
        keep_states = captured is not None and "hidden_states" in captured
        layers = DecoderPass(
            self.layers,
            self.schedule,
            batch,
            {None: (cos.unsqueeze(0), sin.unsqueeze(0))},
            caches,
            keep_states=keep_states,
            arguments=kwargs,
        )
        packed = batch.pack(hidden_states)
        with _own_capturing() if keep_states else nullcontext():
            routing = layers.run_routed(packed, self.recursion, call.generating)
        if keep_states:
            record_states(captured, hidden_states, [batch.unpack(state) for state in layers.states])
        self._last.output = routing
        call.add(self.slots[0], routing, batch.unpack_masked(routing.depths, 0))
        if caches is not None:
            last = batch.last_positions()
            for cache in caches:
                cache.advance(last)
        return batch.unpack(routing.hidden)

    def _pack(
        self,
        hidden: Tensor,
        position_ids: Tensor | None,
        caches: list[RecursionCacheLayer] | None,
        call: SwapCall,
    ) -> PackedBatch:
        cache = None if caches is None else caches[0]
        batch = pack_call(hidden, call.attention_mask, position_ids, call.described, cache)
        if batch.has_documents and call.attention_mask is not None:
            # The dense layers would not separate them: Transformers does so without a mask only.
            raise ValueError(
                f"{self.where}: documents packed in a row are told apart by position_ids alone: "
                "expected no attention_mask beside position_ids that restart, and only 0 and 1 in "
                "it"
            )
        return batch


def pack_call(
    hidden: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    described: bool,
    cache: RecursionCacheLayer | None,
) -> PackedBatch:
    """Packs the tokens [B, S, ...] of a decoder's call.

    Args:
        hidden: their states.
        attention_mask: as the caller gave it.
        position_ids: as the layers get them.
        described: the caller gave position_ids. Those that the model counted itself hold no
            documents, and looking for them would wait for the device.
        cache: of a layer that routes; with one, a row is one document.
    """
    counted = not described and attention_mask is None
    return pack(
        (hidden.shape[0], hidden.shape[1]),
        hidden.device,
        attention_mask,
        None if counted else position_ids,
        past=None if cache is None else cache.last_positions,
        documents=cache is None,
    )


@contextmanager
def _own_capturing() -> Iterator[None]:
    """Transformers' hooks on the layers inside see nothing: they would record packed rows."""
    token = _active_collector.set(None)
    try:
        yield
    finally:
        _active_collector.reset(token)


def record_states(captured: Any, first: Tensor, states: list[Tensor]) -> None:
    """Adds states [B, S, D] to those that Transformers captures, as its hooks do."""
    found, wanted = captured["hidden_states"], captured.get("_hidden_states_layers")
    for state in states if found else [first, *states]:
        found.append(state if wanted is None or len(found) in wanted else None)
