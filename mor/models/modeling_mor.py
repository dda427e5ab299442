"""MoRModel and MoRForCausalLM: a dense model's own layers, shared over recursions and routed.

One file over 300 lines, because Transformers' users look for a model in modeling_NAME.py.
"""

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    DynamicCache,
    GenerationConfig,
    GenerationMixin,
    PreTrainedModel,
)
from transformers.cache_utils import Cache

from mor.models.attention import layer_types_at, skip_reused_projections
from mor.models.cache import RecursionCacheLayer
from mor.models.configuration_mor import MoRConfig
from mor.models.construction import base_model, initialise, recursion
from mor.models.conversion import initialise_from_dense, source_layers
from mor.models.outputs import MoRCausalLMOutput, MoRModelOutput
from mor.models.relaxation import initialise_adapters, relax
from mor.models.unrolled import UnrolledLayers, states_of_all_tokens
from mor.modules.expert_choice import ExpertChoice
from mor.modules.metrics import RoutingMetrics
from mor.modules.packing import Packing, pack
from mor.modules.recursion import RecursionOutput
from mor.modules.token_choice import TokenChoice

__all__ = ["MoRForCausalLM", "MoRModel", "MoRPreTrainedModel", "batch_share"]


class MoRPreTrainedModel(PreTrainedModel):
    """Loading, saving and initialisation shared by the MoR models."""

    config_class = MoRConfig
    config: MoRConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _keep_in_fp32_modules_strict = ["recursion.bias"]  # noqa: RUF012 - of loss-free balancing
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
        initialise(self.config, module)
        if isinstance(module, ExpertChoice | TokenChoice):
            for buffer in module.buffers(recurse=False):
                nn.init.zeros_(buffer)
        if isinstance(module, MoRModel) and module.recursion_encoding is not None:
            nn.init.ones_(module.recursion_encoding)

    def initialize_weights(self) -> None:
        """As Transformers, which calls `_init_weights` for no module without tensors of its own."""
        super().initialize_weights()
        initialise_adapters(self)

    def save_pretrained(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:
        """As Transformers, plus a one-line file by which trust_remote_code finds this package."""
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

    embed_tokens: nn.Module
    layers: nn.ModuleList
    norm: nn.Module
    rotary_emb: nn.Module
    rotary_types: list[str | None]

    def __init__(self, config: MoRConfig) -> None:
        super().__init__(config)
        self.schedule = config.layer_schedule
        self.uses = config.layer_uses
        self.encoded_depths = config.encoded_depths
        base = base_model(config)
        self.embed_tokens = base.embed_tokens
        self.layers = base.layers
        self.norm = base.norm
        self.rotary_emb = base.rotary_emb
        # Gemma 3 turns windowed and full layers by different angles; others know one kind only.
        one_kind = getattr(base.rotary_emb, "layer_types", None) is None
        self.rotary_types = [None] * len(base.layers) if one_kind else base.config.layer_types
        self.recursion = recursion(config)
        self.recursion_encoding = (
            nn.Parameter(torch.ones(len(self.encoded_depths), config.hidden_size))
            if config.recursion_encoding
            else None
        )
        if config.relaxation is not None:
            relax(self.layers, config)
        self._no_split_modules = sorted({type(layer).__name__ for layer in self.layers})
        if config.kv_strategy == "shared":
            for layer in self.layers:
                skip_reused_projections(layer.get_submodule("self_attn"))
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
            position_ids: [B, S] int64. Without pads, positions that restart at 0 inside a row
                separate documents, which do not attend to each other.
            past_key_values: cache of earlier columns.
            use_cache: make and return a cache; default `config.use_cache` in evaluation, False in
                training.
            output_hidden_states: return the states of all unrolled layers.
            cu_seq_lens_q: [documents + 1] int32 for B = 1, document boundaries given outright.
            **kwargs: passed to the decoder layers.

        Raises:
            ValueError: both or neither of input_ids and inputs_embeds, one of wrong shape, tokens
                outside the vocabulary (on the CPU), masks of wrong shape, a cache that is not
                MoR's.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("MoRModel: expected exactly one of input_ids and inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(_checked_tokens(input_ids, self.config.vocab_size))
        elif inputs_embeds.dim() != 3 or inputs_embeds.shape[2] != self.config.hidden_size:
            raise ValueError(
                f"inputs_embeds: expected [B, S, {self.config.hidden_size}], got "
                f"{list(inputs_embeds.shape)}"
            )
        if use_cache is None:
            use_cache = bool(self.config.use_cache) and not self.training
        if self.training and any(getattr(m, "gradient_checkpointing", False) for m in self.layers):
            use_cache, past_key_values = False, None  # the recomputation would append twice
            _check_checkpointing(self)
        if self.config.router == "expert" and self.config.eval_routing == "topk":
            if past_key_values is not None:
                raise ValueError(
                    'MoRModel: eval_routing="topk" ranks whole sequences, so it has no cache: pass '
                    'use_cache=False, or choose eval_routing="threshold"'
                )
            use_cache = False
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
        call = UnrolledLayers(self, batch, past_key_values, kwargs)
        hidden = batch.pack(inputs_embeds)
        if states is not None:
            states.append(hidden)
        hidden, routing = self._run_all(hidden, call, states)
        hidden = self.norm(hidden)
        if states is not None:
            states[-1] = hidden
        if past_key_values is not None:
            last = batch.last_positions()
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
        self, hidden: Tensor, call: UnrolledLayers, states: list[Tensor] | None
    ) -> tuple[Tensor, RecursionOutput]:
        """All unrolled layers on packed rows [N, D]; appends [N, D] to `states` after each."""
        ends = 1 if self.config.sharing.startswith("middle") else 0
        block_depth, last = self.config.block_depth, len(self.schedule) - 1
        packing = call.packing
        outputs: list[list[Tensor]] = []  # of the layers of each step, if states are wanted

        def block(x: Tensor, current: Packing, step: int, rows: Tensor) -> Tensor:
            first = ends + step * block_depth
            spare = torch.compiler.is_compiling() and current.lengths is None
            if spare:
                x, current = call.add_spare_row(x, current)
            elif x.shape[0] == 0:
                return call.run_without_rows(x, range(first, first + block_depth))
            outputs.append([])
            rotary = call.rotary(x, current)
            for depth in range(first, first + block_depth):
                x = call.run(depth, x, current, rotary, rows)
                if states is not None:
                    outputs[-1].append(x[:-1] if spare else x)
            return x[:-1] if spare else x

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
            states.extend(states_of_all_tokens(routing, outputs, block_depth))
        if ends:
            hidden = call.run(last, hidden, packing, everything)
            if states is not None:
                states.append(hidden)
        return hidden, routing


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
        if config.tie_word_embeddings:  # not in checkpoints, so the Trainer must not miss it there
            self._keys_to_ignore_on_save = ["lm_head.weight"]
        self.post_init()

    @classmethod
    def from_dense(
        cls,
        model_or_path: PreTrainedModel | str | Path,
        config: MoRConfig | None = None,
        init: str = "stepwise",
        seed: int = 0,
        *,
        gguf_file: str | None = None,
        dtype: torch.dtype | None = None,
        svd_start: bool = True,
        **options: Any,
    ) -> "MoRForCausalLM":
        """Converts a dense causal language model; its layers start the unique layers.

        Args:
            model_or_path: a loaded model, or a local directory (or hub name) in Transformers'
                format.
            config: the MoR configuration; its base_config must be that of the dense model, but for
                the depth. Without it, `options` are those of `MoRConfig`, the base_config the dense
                model's.
            init: "stepwise", "average", "lower", "upper" or "random"; see
                `mor.models.conversion.source_layers`.
            seed: of "random" and of the routers.
            gguf_file: name of a GGUF file in the directory, read by Transformers.
            dtype: of the weights; default the dense model's.
            svd_start: with relaxation: start each adapter at the truncated SVD of what its dense
                layer is more than the shared layer; False: at zero.
            **options: of `MoRConfig`; `num_hidden_layers` is the unrolled depth, default the dense
                model's.

        Raises:
            ValueError: a dense architecture that MoR cannot use, a depth that the recursions do not
                divide.
            OSError: a path without a model.

        Reference: MoR paper, appendix (initialisation from pretrained models).
        """
        if isinstance(model_or_path, PreTrainedModel):
            dense = model_or_path
        else:
            dense = AutoModelForCausalLM.from_pretrained(
                model_or_path, gguf_file=gguf_file, dtype=dtype or "auto"
            )
        if hasattr(dense.config, "mor_swap") or isinstance(dense.config, MoRConfig):
            raise ValueError("from_dense: expected a dense model, got one with recursions already")
        if config is None:
            base = copy.deepcopy(dense.config)
            base.num_hidden_layers = options.pop("num_hidden_layers", base.num_hidden_layers)
            if hasattr(base, "quantization_config"):  # of a GGUF file, whose weights are now plain
                del base.quantization_config
            if types := layer_types_at(base, base.num_hidden_layers, "from_dense"):
                base.layer_types = types
            config = MoRConfig(base_config=base, **options)
        elif options:
            raise ValueError(f"from_dense: expected config or options, got both ({list(options)})")
        if type(dense.config) is not type(config.base_config):
            raise ValueError(
                f"from_dense: expected a dense model of {type(config.base_config).__name__}, got "
                f"{type(dense.config).__name__}"
            )
        sources = source_layers(config, dense.config.num_hidden_layers, init, seed)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = cls(config)
        model.to(dtype or dense.dtype)
        initialise_from_dense(model, dense, sources, svd_start)
        model.generation_config = copy.deepcopy(dense.generation_config)
        return model

    @property
    def routing_metrics(self) -> RoutingMetrics:
        """See `MoRModel.routing_metrics`."""
        return self.model.routing_metrics

    def forward(  # noqa: D417 - the other arguments are those of MoRModel.forward
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
        """Logits and, with labels, the training loss.

        Args:
            input_ids: this and what is not named here: see `MoRModel.forward`.
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
            if labels.shape != logits.shape[:2]:
                raise ValueError(
                    f"labels: expected shape {list(logits.shape[:2])} (one for every token with "
                    f"logits), got {list(labels.shape)}"
                )
            lm_loss = self.loss_function(
                logits=logits,
                labels=labels,
                vocab_size=self.config.vocab_size,
                num_items_in_batch=num_items_in_batch,
            )
            loss = lm_loss.clone()  # the Trainer scales it in place
            if base.router_loss is not None:
                loss = lm_loss + batch_share(labels, num_items_in_batch) * base.router_loss
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
        """As Transformers, with positions counted from the mask: right padding works too."""
        inputs = super().prepare_inputs_for_generation(
            input_ids, attention_mask=attention_mask, **kwargs
        )
        if attention_mask is not None and attention_mask.dim() == 2:
            columns = inputs.get("input_ids", inputs.get("inputs_embeds")).shape[1]
            positions = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
            inputs["position_ids"] = positions[:, -columns:]
        return inputs

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As Transformers; the cache is recursion-wise and grows.

        Raises:
            ValueError: a cache_implementation other than dynamic.
        """
        config = kwargs.get("generation_config") or self.generation_config
        wanted = kwargs.get("cache_implementation") or config.cache_implementation
        if wanted not in (None, "dynamic", "dynamic_full"):
            raise ValueError(f"MoR: expected a dynamic cache, got cache_implementation={wanted!r}")
        return super().generate(*args, **kwargs)

    def generate_batch(self, *args: Any, **kwargs: Any) -> Any:
        """Transformers' continuous batching keeps every token in every layer's cache: refused.

        Raises:
            NotImplementedError: always; its cache would give wrong tokens without an error.
        """
        raise NotImplementedError(
            "MoR: generate_batch has no place for tokens that leave early; use generate()"
        )


def _checked_tokens(input_ids: Any, vocab_size: int) -> Tensor:
    """Values are looked at on the CPU alone: elsewhere that would wait for the device."""
    if input_ids.dim() != 2 or input_ids.dtype not in (torch.int64, torch.int32):
        raise ValueError(
            f"input_ids: expected integers [B, S], got {input_ids.dtype} {list(input_ids.shape)}"
        )
    if input_ids.device.type == "cpu" and not torch.compiler.is_compiling() and input_ids.numel():
        for token in map(int, torch.aminmax(input_ids)):
            if not 0 <= token < vocab_size:
                raise ValueError(f"input_ids: expected tokens in [0, {vocab_size}), got {token}")
    tokens: Tensor = input_ids
    return tokens


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


def batch_share(labels: Tensor, num_items_in_batch: Tensor | int | None) -> Tensor | float:
    """This batch's share of the targets of the optimizer step: the weight of its router loss."""
    if num_items_in_batch is None:
        return 1.0
    return (labels[:, 1:] != -100).sum() / num_items_in_batch


def _check_checkpointing(model: MoRModel) -> None:
    """Reentrant checkpoints cut the graph between the first and later uses of shared keys."""
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


AutoConfig.register("mor", MoRConfig, exist_ok=True)
AutoModel.register(MoRConfig, MoRModel, exist_ok=True)
AutoModelForCausalLM.register(MoRConfig, MoRForCausalLM, exist_ok=True)
