"""MoRModel and MoRForCausalLM: a dense model's own layers, shared over recursions and routed."""

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    MODEL_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    DynamicCache,
    GenerationConfig,
    GenerationMixin,
    PreTrainedModel,
)
from transformers.cache_utils import Cache
from transformers.utils import ModelOutput

from mor.models.attention import AttentionContext, SharedKV, skip_reused_projections
from mor.models.cache import RecursionCacheLayer
from mor.models.configuration_mor import MoRConfig
from mor.modules.metrics import RoutingMetrics
from mor.modules.packing import PackedBatch, Packing, pack
from mor.modules.recursion import ExpertChoice, RecursionOutput, TokenChoice
from mor.modules.routers import RouterScore

__all__ = [
    "MoRCausalLMOutput",
    "MoRForCausalLM",
    "MoRModel",
    "MoRModelOutput",
    "MoRPreTrainedModel",
]


@dataclass
class MoRModelOutput(ModelOutput):
    """Output of `MoRModel`.

    Attributes:
        last_hidden_state: [B, S, D] after the final norm; a pad shows the token before it.
        past_key_values: the cache, if one is used.
        hidden_states: L + 1 states [B, S, D], embeddings first, on request. Inside the recursions a
            token that is not active keeps its state.
        token_depths: [B, S] int64 recursion steps each token took; 0 for pads.
        aux_loss, z_loss, balancing_loss: unscaled router losses; None where not used.
        router_loss: their weighted sum, what the loss contains besides the language-model loss.
        routing: the recursion in packed rows, for inspection.
    """

    last_hidden_state: Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    token_depths: Tensor | None = None
    aux_loss: Tensor | None = None
    z_loss: Tensor | None = None
    balancing_loss: Tensor | None = None
    router_loss: Tensor | None = None
    routing: RecursionOutput | None = None


@dataclass
class MoRCausalLMOutput(ModelOutput):
    """Output of `MoRForCausalLM`; the fields it shares with `MoRModelOutput` mean the same.

    Attributes:
        loss: lm_loss + router_loss (weighted by this batch's share of `num_items_in_batch`, so that
            gradient accumulation and several processes do not change the weight).
        logits: [B, S, V].
        lm_loss: next-token cross-entropy.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    token_depths: Tensor | None = None
    lm_loss: Tensor | None = None
    aux_loss: Tensor | None = None
    z_loss: Tensor | None = None
    balancing_loss: Tensor | None = None
    router_loss: Tensor | None = None
    routing: RecursionOutput | None = None


class MoRPreTrainedModel(PreTrainedModel):
    """Loading, saving and initialisation shared by the MoR models."""

    config_class = MoRConfig
    config: MoRConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012 - Transformers' convention
    _supports_attention_backend = True

    def get_correct_attn_implementation(
        self, requested_attention: str | None, is_init_check: bool = False
    ) -> str:
        """MoR attends through depth_attention only."""
        if requested_attention not in (None, "mor"):
            raise ValueError(
                f"MoR models use attn_implementation='mor', got {requested_attention!r}"
            )
        return "mor"

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, ExpertChoice | TokenChoice):
            for buffer in module.buffers(recurse=False):
                nn.init.zeros_(buffer)

    def save_pretrained(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:
        """As Transformers, plus a one-line file by which tools load the model with trust_remote_code."""
        self.config.auto_map = {
            "AutoConfig": "mor_auto.MoRConfig",
            "AutoModel": "mor_auto.MoRModel",
            "AutoModelForCausalLM": "mor_auto.MoRForCausalLM",
        }
        super().save_pretrained(save_directory, *args, **kwargs)
        shim = Path(save_directory) / "mor_auto.py"
        shim.write_text("from mor import MoRConfig, MoRForCausalLM, MoRModel  # noqa: F401\n")


class MoRModel(MoRPreTrainedModel):
    """The decoder without a head; see `MoRConfig`.

    Embedding, own first and last layer (middle sharing) and final norm see every token; between
    them the shared block runs up to `num_recursions` times on the tokens the router keeps. All
    layers are those of the dense architecture (`config.base_config`), called on packed rows.
    """

    def __init__(self, config: MoRConfig) -> None:
        super().__init__(config)
        self.schedule = config.layer_schedule
        base = _base_model(config)
        self.embed_tokens = base.embed_tokens
        self.layers = base.layers
        self.norm = base.norm
        self.rotary_emb = base.rotary_emb
        self.recursion = _recursion(config)
        self._no_split_modules = sorted({type(layer).__name__ for layer in self.layers})
        if config.kv_strategy == "shared":
            for layer in self.layers:
                skip_reused_projections(layer.self_attn)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The token embedding."""
        return self.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replaces the token embedding."""
        self.embed_tokens = value

    @property
    def routing_metrics(self) -> RoutingMetrics:
        """How tokens were routed since its last `reset()`; `compute()` gives a dict of floats."""
        return self.recursion.metrics if self.recursion is not None else RoutingMetrics(0)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        cu_seq_lens_q: Tensor | None = None,
        **kwargs: Any,
    ) -> MoRModelOutput:
        """Hidden states of a batch.

        Args:
            input_ids: [B, S] int64; or
            inputs_embeds: [B, S, D].
            attention_mask: [B, S] (or [B, past + S]), non-zero at tokens. Pads, on either side, are
                left out of everything: attention, routing capacity, cache.
            position_ids: [B, S] int64. Without an attention mask, positions that restart inside a
                row separate documents, which do not attend to each other.
            past_key_values: cache of earlier columns.
            use_cache: make and return a cache; default `config.use_cache` in evaluation, False in
                training.
            output_hidden_states: return the states of all unrolled layers.
            cu_seq_lens_q: [documents + 1] int32 for B = 1, document boundaries given outright.
            **kwargs: passed to the decoder layers.

        Raises:
            ValueError: both or neither of input_ids and inputs_embeds, masks of wrong shape, a
                cache that is not MoR's.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("MoRModel: expected exactly one of input_ids and inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if use_cache is None:
            use_cache = bool(self.config.use_cache) and not self.training
        if self.training and any(getattr(m, "gradient_checkpointing", False) for m in self.layers):
            use_cache, past_key_values = False, None  # the recomputation would append twice
            _check_checkpointing(self)
        past_length = past_key_values.get_seq_length() if past_key_values is not None else 0
        batch = pack(
            (inputs_embeds.shape[0], inputs_embeds.shape[1]),
            inputs_embeds.device,
            attention_mask,
            position_ids,
            cu_seq_lens_q,
            past_length=past_length,
            documents=past_key_values is None,
        )
        if batch.packing.num_sequences != batch.shape[0]:
            use_cache = False  # documents packed in a row are not continued
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if past_key_values is not None:
            _check_cache(past_key_values, self.config)

        if batch.packing.num_rows == 0:
            raise ValueError("MoRModel: expected at least one token, got a batch of pads only")
        states: list[Tensor] | None = [] if output_hidden_states else None
        call = _Call(self, batch, past_key_values, kwargs)
        hidden = batch.pack(inputs_embeds)
        if states is not None:
            states.append(hidden)
        hidden, routing = self._run_all(hidden, call, states)
        hidden = self.norm(hidden)
        if states is not None:
            states[-1] = hidden
        if past_key_values is not None:
            last = _last_positions(batch)
            for layer in past_key_values.layers:
                layer.advance(batch.shape[1], last)
        return MoRModelOutput(
            last_hidden_state=batch.unpack(hidden),
            past_key_values=past_key_values,
            hidden_states=tuple(batch.unpack(s) for s in states) if states is not None else None,
            token_depths=batch.unpack_masked(routing.depths, 0),
            aux_loss=routing.aux_loss,
            z_loss=routing.z_loss,
            balancing_loss=routing.balancing_loss,
            router_loss=_router_loss(routing, self.config),
            routing=routing,
        )

    def _run_all(
        self, hidden: Tensor, call: "_Call", states: list[Tensor] | None
    ) -> tuple[Tensor, RecursionOutput]:
        """All unrolled layers on packed rows [N, D]; appends [N, D] to `states` after each."""
        ends = 1 if self.config.sharing.startswith("middle") else 0
        block_depth, last = self.config.block_depth, len(self.schedule) - 1
        packing = call.packing
        outputs: list[list[Tensor]] = []  # of the layers of each step, if states are wanted

        def block(x: Tensor, current: Packing, step: int, rows: Tensor) -> Tensor:
            first = ends + step * block_depth
            if x.shape[0] == 0:
                return call.run_without_rows(x, range(first, first + block_depth))
            outputs.append([])
            rotary = call.rotary(x, current)
            for depth in range(first, first + block_depth):
                x = call.run(depth, x, current, rotary, rows)
                if states is not None:
                    outputs[-1].append(x)
            return x

        everything = call.rotary(hidden, packing)
        if ends:
            hidden = call.run(0, hidden, packing, everything)
            if states is not None:
                states.append(hidden)
        if self.recursion is not None:
            routing = self.recursion(hidden, packing, block, states is not None)
            hidden = routing.hidden
        else:
            for depth in range(ends, last + 1 - ends):
                hidden = call.run(depth, hidden, packing, everything)
                if states is not None:
                    states.append(hidden)
            depths = torch.full_like(packing.positions, self.config.num_recursions)
            routing = RecursionOutput(hidden, depths)
        if states is not None and self.recursion is not None:
            states.extend(_states_of_all_tokens(routing, outputs, block_depth))
        if ends:
            hidden = call.run(last, hidden, packing, everything)
            if states is not None:
                states.append(hidden)
        return hidden, routing


class _Call:
    """The layers of a model during one forward call: packing, cache and shared keys."""

    def __init__(
        self, model: MoRModel, batch: PackedBatch, cache: Cache | None, kwargs: dict[str, Any]
    ) -> None:
        self.model, self.packing, self.kwargs = model, batch.packing, kwargs
        self.caches = cache.layers if cache is not None else [None] * len(model.schedule)
        self.longest = batch.shape[1]
        self.strategy = model.config.kv_strategy
        self.shared: dict[int, SharedKV] = {}

    def rotary(self, x: Tensor, packing: Packing) -> tuple[Tensor, Tensor]:
        """cos and sin [1, K, head_dim] at the original positions."""
        return self.model.rotary_emb(x.unsqueeze(0), packing.positions.unsqueeze(0))

    def run(
        self,
        depth: int,
        x: Tensor,
        packing: Packing,
        rotary: tuple[Tensor, Tensor],
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
            packing, self.caches[depth], self.longest, shared, reuses, overwritten
        )
        return self._layer(unique, x, rotary, context)

    def run_without_rows(self, x: Tensor, depths: range) -> Tensor:
        """A step that no token takes: its layers run on one row of zeros, whose result is dropped.

        Every process must call every layer, or FSDP and DDP wait for gradients that never come;
        and Transformers' layers cannot reshape zero rows.
        """
        row = x.new_zeros(1, x.shape[1]) + 0 * x.sum()
        packing = Packing.uniform(1, 1, self.packing.positions.new_zeros(1))
        rotary = self.rotary(row, packing)
        for depth in depths:
            unique = self.model.schedule[depth]
            row = self._layer(unique, row, rotary, AttentionContext(packing))
            cache = self.caches[depth]
            if self.strategy == "hybrid" and cache is not None:
                shared = self.shared[unique]
                cache.append(shared.keys, shared.values, self.packing, self.longest)
        return row[:0]

    def _layer(
        self, unique: int, x: Tensor, rotary: tuple[Tensor, Tensor], context: AttentionContext
    ) -> Tensor:
        out = self.model.layers[unique](
            x.unsqueeze(0), position_embeddings=rotary, mor_context=context, **self.kwargs
        )
        return (out[0] if isinstance(out, tuple) else out).squeeze(0)


def _states_of_all_tokens(
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


class MoRForCausalLM(MoRPreTrainedModel, GenerationMixin):
    """Language model with a (tied, if the dense model's is) head; trains, saves and generates.

    Example:
        >>> from transformers import LlamaConfig
        >>> config = MoRConfig(
        ...     base_config=LlamaConfig(
        ...         vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=5,
        ...         num_attention_heads=4, num_key_value_heads=2))
        >>> model = MoRForCausalLM(config)
        >>> tokens = torch.arange(8).unsqueeze(0)
        >>> output = model(tokens, labels=tokens)
        >>> output.logits.shape, output.token_depths.shape
        (torch.Size([1, 8, 64]), torch.Size([1, 8]))
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: MoRConfig) -> None:
        super().__init__(config)
        self.model = MoRModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.generation_config = GenerationConfig.from_model_config(config.base_config)
        self.post_init()

    @property
    def routing_metrics(self) -> RoutingMetrics:
        """See `MoRModel.routing_metrics`."""
        return self.model.routing_metrics

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: Tensor | int | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> MoRCausalLMOutput | tuple[Any, ...]:
        """Logits and, with labels, the training loss; see `MoRModel.forward` for the other arguments.

        Args:
            labels: [B, S] int64, not shifted; -100 is ignored.
            logits_to_keep: number of last columns (0: all), or their indices.
            num_items_in_batch: valid targets of the whole optimizer step, as the Trainer passes.
            return_dict: False gives a tuple.

        Raises:
            ValueError: see `MoRModel.forward`.
        """
        base: MoRModelOutput = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            **kwargs,
        )
        hidden = base.last_hidden_state
        assert hidden is not None
        if isinstance(logits_to_keep, int):
            hidden = hidden[:, -logits_to_keep:] if logits_to_keep else hidden
        else:
            hidden = hidden[:, logits_to_keep]
        logits = self.lm_head(hidden)
        loss = lm_loss = None
        if labels is not None:
            lm_loss = self.loss_function(
                logits=logits,
                labels=labels,
                vocab_size=self.config.vocab_size,
                num_items_in_batch=num_items_in_batch,
            )
            loss = lm_loss
            if base.router_loss is not None:
                loss = lm_loss + _batch_share(labels, num_items_in_batch) * base.router_loss
        output = MoRCausalLMOutput(
            loss=loss,
            logits=logits,
            past_key_values=base.past_key_values,
            hidden_states=base.hidden_states,
            token_depths=base.token_depths,
            lm_loss=lm_loss,
            aux_loss=base.aux_loss,
            z_loss=base.z_loss,
            balancing_loss=base.balancing_loss,
            router_loss=base.router_loss,
            routing=base.routing,
        )
        return output.to_tuple() if return_dict is False else output

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """As Transformers, with positions counted from the mask, so that right padding works too."""
        inputs = super().prepare_inputs_for_generation(
            input_ids, attention_mask=attention_mask, **kwargs
        )
        if attention_mask is not None and attention_mask.dim() == 2:
            columns = inputs.get("input_ids", inputs.get("inputs_embeds")).shape[1]
            positions = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
            inputs["position_ids"] = positions[:, -columns:]
        return inputs

    def generate_batch(self, *args: Any, **kwargs: Any) -> Any:
        """Transformers' continuous batching keeps every token in every layer's cache: refused.

        Raises:
            NotImplementedError: always; its cache would give wrong tokens without an error.
        """
        raise NotImplementedError(
            "MoR: generate_batch has no place for tokens that leave early; use generate()"
        )


def _base_model(config: MoRConfig) -> nn.Module:
    """The dense architecture with only the unique layers, its attention served by mor."""
    base = copy.deepcopy(config.base_config)
    types = getattr(base, "layer_types", None)
    base.num_hidden_layers = config.num_unique_layers
    if types is not None:
        first_use = [config.layer_schedule.index(layer) for layer in range(base.num_hidden_layers)]
        base.layer_types = [types[depth] for depth in first_use]
        if any(kind != "full_attention" for kind in base.layer_types):
            raise ValueError(
                f"MoRConfig.base_config: only full attention layers are supported, got {types}"
            )
    base._attn_implementation = "mor"
    if type(base) not in MODEL_MAPPING:
        raise ValueError(f"MoRConfig.base_config: no model is known for {type(base).__name__}")
    model = MODEL_MAPPING[type(base)](base)
    for name in ("embed_tokens", "layers", "norm", "rotary_emb"):
        if not hasattr(model, name):
            raise ValueError(
                f"MoRConfig.base_config: {type(model).__name__} has no {name}; expected a decoder "
                "of the Llama family"
            )
    return model


def _recursion(config: MoRConfig) -> ExpertChoice | TokenChoice | None:
    if config.router is None:
        return None
    assert config.router_func is not None and config.router_alpha is not None
    score = RouterScore(config.router_func, config.router_alpha)
    common: dict[str, Any] = {
        "router_type": config.router_type,
        "temperature": config.router_temperature,
        "std": config.initializer_range,
        "score": score,
        "gating": config.router_gating,
        "use_z_loss": config.router_z_coef != 0,
    }
    if config.router == "expert":
        return ExpertChoice(
            config.hidden_size,
            config.num_recursions,
            capacities=config.capacities,
            aux=config.router_aux,
            eval_routing=config.eval_routing,
            capacity_warmup_steps=config.capacity_warmup_steps,
            **common,
        )
    return TokenChoice(
        config.hidden_size,
        config.num_recursions,
        balancing=config.router_balancing,
        bias_update_rate=config.router_bias_update_rate,
        balance_warmup_steps=config.balance_warmup_steps,
        **common,
    )


def _router_loss(routing: RecursionOutput, config: MoRConfig) -> Tensor | None:
    parts = [
        coef * loss
        for coef, loss in (
            (config.router_aux_coef, routing.aux_loss),
            (config.router_z_coef, routing.z_loss),
            (config.router_balance_coef, routing.balancing_loss),
        )
        if loss is not None
    ]
    return torch.stack(parts).sum() if parts else None


def _batch_share(labels: Tensor, num_items_in_batch: Tensor | int | None) -> Tensor | float:
    """This batch's share of the targets of the optimizer step: the weight of its router loss."""
    if num_items_in_batch is None:
        return 1.0
    return (labels[:, 1:] != -100).sum() / num_items_in_batch


def _check_checkpointing(model: MoRModel) -> None:
    """Reentrant checkpoints cut the graph between the first use of shared keys and the later ones."""
    options = getattr(model.layers[0]._gradient_checkpointing_func, "keywords", {})
    if model.config.kv_strategy != "recursion" and options.get("use_reentrant"):
        raise ValueError(
            f"MoRModel: kv_strategy {model.config.kv_strategy} needs gradient checkpointing with "
            "use_reentrant=False"
        )


def _check_cache(cache: Cache, config: MoRConfig) -> None:
    layers = getattr(cache, "layers", [])
    if len(layers) != config.num_hidden_layers or not all(
        isinstance(layer, RecursionCacheLayer) for layer in layers
    ):
        kinds = sorted({type(layer).__name__ for layer in layers}) or ["none"]
        raise ValueError(
            f"past_key_values: expected DynamicCache(config=model.config) with "
            f"{config.num_hidden_layers} RecursionCacheLayer, got {len(layers)} layers of {kinds}"
        )


def _last_positions(batch: PackedBatch) -> Tensor:
    """[B] position of the last token of each row; -1 for a row of pads."""
    packing = batch.packing
    ends = packing.cu_seqlens[1:].long() - 1
    if packing.num_rows == 0:
        return torch.full_like(ends, -1)
    return torch.where(packing.cu_seqlens.diff() > 0, packing.positions[ends.clamp(min=0)], -1)


AutoConfig.register("mor", MoRConfig, exist_ok=True)
AutoModel.register(MoRConfig, MoRModel, exist_ok=True)
AutoModelForCausalLM.register(MoRConfig, MoRForCausalLM, exist_ok=True)
