"""Decoder layers of a Transformers model as one routed block: what `mor.swap` puts in."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.utils.output_capturing import _active_collector

from mor.models.cache import RecursionCacheLayer
from mor.models.layer_pass import DecoderPass
from mor.models.outputs import MoRModelOutput
from mor.models.schedule import Schedule
from mor.modules.expert_choice import ExpertChoice
from mor.modules.packing import pack
from mor.modules.recursion import LastRouting, RecursionOutput
from mor.modules.recursion_options import recursion_with
from mor.modules.token_choice import TokenChoice

__all__ = ["RoutedLayers", "SwapCall"]


@dataclass(eq=False)
class SwapCall:
    """One forward call of a swapped model, from its arguments to its output.

    Attributes:
        attention_mask: [B, S] or [B, past + S] as the caller gave it.
        generating: see `ExpertChoice.forward`.
        routing: of the routed block.
        token_depths: [B, S] recursion steps that each token took; 0 for pads.
        output: of the decoder.
    """

    attention_mask: Tensor | None = None
    generating: bool = False
    routing: RecursionOutput | None = None
    token_depths: Tensor | None = None
    output: MoRModelOutput | None = None


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
        num_recursions: R.
        router: "expert" or "token".
        **options: of `ExpertChoice` or `TokenChoice`.

    Attributes:
        routing: the `RecursionOutput` of this thread's last call.
    """

    def __init__(
        self,
        layers: Sequence[nn.Module],
        config: Any,
        slots: Sequence[int],
        num_recursions: int,
        router: str,
        **options: Any,
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.slots, self.num_dense_layers = tuple(slots), config.num_hidden_layers
        if router not in ("expert", "token"):
            raise ValueError(
                f"swap: expected router to be expert or token, got {router!r}; for recursion "
                "without a router, MoRForCausalLM.from_dense(model, router=None)"
            )
        recursion = recursion_with("swap", router, config.hidden_size, num_recursions, options)
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
                "swap: generate_batch has no place for tokens that exit early; use generate()"
            )
        call = SwapCall() if mor_call is None else mor_call
        batch_size, length, _ = hidden_states.shape
        caches = self._caches(past_key_values)
        batch = pack(
            (batch_size, length),
            hidden_states.device,
            call.attention_mask,
            position_ids,
            past=None if caches is None else caches[0].last_positions,
            documents=past_key_values is None,
        )
        if batch.has_documents and call.attention_mask is not None:
            # The dense layers would not separate them: Transformers does so without a mask only.
            raise ValueError(
                "swap: documents packed in a row are told apart by position_ids alone: expected no "
                "attention_mask beside position_ids that restart, and only 0 and 1 in it"
            )
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
            _record(captured, hidden_states, [batch.unpack(state) for state in layers.states])
        self._last.output = routing
        if call.routing is None:  # a recomputation changes nothing
            call.routing, call.token_depths = routing, batch.unpack_masked(routing.depths, 0)
        if caches is not None:
            last = batch.last_positions()
            for cache in caches:
                cache.advance(last)
        return batch.unpack(routing.hidden)

    def _caches(self, cache: Cache | None) -> list[RecursionCacheLayer] | None:
        """The cache's layer of each depth; made where there was none of this kind."""
        if cache is None:
            return None
        if len(cache.layers) < self.num_dense_layers:
            raise ValueError(
                "swap: expected past_key_values = DynamicCache(config=model.config), got a cache "
                f"of {len(cache.layers)} layers"
            )
        indices = self.schedule.caches
        while len(cache.layers) <= max(indices):
            cache.layers.append(RecursionCacheLayer())
        for index in indices:
            if not isinstance(cache.layers[index], RecursionCacheLayer):
                if cache.layers[index].get_seq_length():
                    raise ValueError(
                        "swap: expected past_key_values that this model filled, got keys of layer "
                        f"{index} from another"
                    )
                cache.layers[index] = RecursionCacheLayer()
        return [cache.layers[index] for index in indices]


@contextmanager
def _own_capturing() -> Iterator[None]:
    """Transformers' hooks on the layers inside see nothing: they would record packed rows."""
    token = _active_collector.set(None)
    try:
        yield
    finally:
        _active_collector.reset(token)


def _record(captured: Any, first: Tensor, states: list[Tensor]) -> None:
    """Adds states [B, S, D] to those that Transformers captures, as its hooks do."""
    found, wanted = captured["hidden_states"], captured.get("_hidden_states_layers")
    for state in states if found else [first, *states]:
        found.append(state if wanted is None or len(found) in wanted else None)
