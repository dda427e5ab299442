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
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_MAPPING_NAMES,
)

from mor.models.arguments import refuse_generation_options, refuse_unused, wants_tuple
from mor.models.attention import layer_types_at, skip_reused_projections
from mor.models.cache import RecursionCacheLayer
from mor.models.configuration_mor import MoRConfig
from mor.models.construction import base_model, initialise, recursion
from mor.models.conversion import initialise_from_dense, source_layers
from mor.models.layer_pass import DecoderPass, Rotary
from mor.models.outputs import MoRCausalLMOutput, MoRModelOutput
from mor.models.relaxation import initialise_adapters, relax
from mor.models.router_losses import TellsLostLosses, hand_over, take_back, tell_lost
from mor.models.targets import at_least_one, batch_share, num_targets
from mor.modules.expert_choice import ExpertChoice
from mor.modules.metrics import RoutingMetrics
from mor.modules.packing import pack
from mor.modules.recursion import RecursionOutput
from mor.modules.token_choice import TokenChoice

__all__ = ["MoRForCausalLM", "MoRModel", "MoRPreTrainedModel"]


class MoRPreTrainedModel(PreTrainedModel):
    """Loading, saving and initialisation shared by the MoR models."""

    config_class = MoRConfig
    config: MoRConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012 - Transformers' convention
    _supports_attention_backend = True

    def __init__(self, config: MoRConfig, *args: Any, **kwargs: Any) -> None:
        if not isinstance(config, MoRConfig):
            name, got = type(self).__name__, type(config).__name__
            raise ValueError(
                f"{name}: expected a MoRConfig, got {got}; write {name}(MoRConfig("
                "base_config=config, num_recursions=3)) for new weights, or "
                "MoRForCausalLM.from_dense(model, num_recursions=3) for those of a dense model"
            )
        super().__init__(config, *args, **kwargs)

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
        """Initialise adapters too: `_init_weights` is called only for modules that own tensors."""
        super().initialize_weights()
        initialise_adapters(self)

    def save_pretrained(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:
        """Save the model and a one-line file by which trust_remote_code finds this package."""
        self.config.auto_map = {
            "AutoConfig": "mor_auto.MoRConfig",
            "AutoModel": "mor_auto.MoRModel",
            "AutoModelForCausalLM": "mor_auto.MoRForCausalLM",
        }
        if not Path(save_directory).is_file():  # first, as push_to_hub uploads what is there
            Path(save_directory).mkdir(parents=True, exist_ok=True)
            shim = Path(save_directory) / "mor_auto.py"
            shim.write_text("from mor import MoRConfig, MoRForCausalLM, MoRModel  # noqa: F401\n")
        super().save_pretrained(save_directory, *args, **kwargs)


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
        self.schedule = config.schedule
        base = base_model(config)
        self.embed_tokens = base.embed_tokens
        self.layers = base.layers
        self.norm = base.norm
        self.rotary_emb = base.rotary_emb
        # Gemma 3 rotates windowed and full layers by different angles; others have one kind only.
        one_kind = getattr(base.rotary_emb, "layer_types", None) is None
        self.rotary_types = [None] * len(base.layers) if one_kind else base.config.layer_types
        self.recursion = recursion(config)
        if isinstance(self.recursion, TokenChoice) and config.router_balancing == "loss_free":
            self._keep_in_fp32_modules_strict = ["recursion.bias"]
        self.recursion_encoding = (
            nn.Parameter(torch.ones(len(self.schedule.encoded_depths), config.hidden_size))
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

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Read pickles of earlier versions too, whose schedule was a list."""
        super().__setstate__(state)
        self.schedule = self.config.schedule

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
        return_dict: bool | None = None,
        cu_seq_lens_q: Tensor | None = None,
        generating: bool = False,
        **kwargs: Any,
    ) -> MoRModelOutput | tuple[Any, ...]:
        """Hidden states of a batch.

        Args:
            input_ids: [B, S] int64; or
            inputs_embeds: [B, S, D].
            attention_mask: [B, S] (or [B, past + S]), 0 at pads, 1 (or the number of its document)
                at tokens. Pads, anywhere, are left out of everything: attention, routing capacity,
                cache.
            position_ids: [B, S] int64; default: the tokens of each row are counted. Positions that
                restart at 0 inside a row separate documents, which do not attend to each other.
            past_key_values: cache of earlier columns; routing is then that of evaluation.
            use_cache: make and return a cache; default `config.use_cache` in evaluation, False in
                training.
            output_hidden_states: return the states of all unrolled layers; default that of the
                configuration.
            return_dict: False gives a tuple; default `config.return_dict`.
            cu_seq_lens_q: [documents + 1] int32 for B = 1, document boundaries given outright.
            generating: route as in evaluation and count nothing, also in training mode; `generate`
                says so, and a call with a cache of earlier columns.
            **kwargs: other arguments of Transformers' models, None or False; anything else is
                refused.

        Raises:
            ValueError: both or neither of input_ids and inputs_embeds, one of wrong shape, tokens
                outside the vocabulary (on the CPU), masks of wrong shape, a cache that is not
                MoR's, an argument that is not used.
        """
        described = position_ids is not None or cu_seq_lens_q is not None
        refuse_unused(kwargs, self.config, "MoRModel", described)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("MoRModel: expected exactly one of input_ids and inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(_checked_tokens(input_ids, self.config.vocab_size))
        elif inputs_embeds.dim() != 3 or inputs_embeds.shape[2] != self.config.hidden_size:
            raise ValueError(
                f"inputs_embeds: expected [B, S, {self.config.hidden_size}], got "
                f"{list(inputs_embeds.shape)}"
            )
        continues = past_key_values is not None
        # What is continued from a cache cannot be ranked as a whole.
        generating = generating or continues or (self.training and bool(use_cache))
        use_cache = self._uses_cache(use_cache, past_key_values, generating)
        if past_key_values is not None:
            _check_cache(past_key_values, self.config)
        layers = past_key_values.layers if past_key_values is not None else None
        batch = pack(
            (inputs_embeds.shape[0], inputs_embeds.shape[1]),
            inputs_embeds.device,
            attention_mask,
            position_ids,
            cu_seq_lens_q,
            past=layers[0].last_positions if layers is not None else None,
            documents=layers is None,
        )
        if batch.has_documents:
            use_cache = False  # documents packed in a row are not continued
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
            layers = past_key_values.layers
        if batch.packing.num_rows == 0 and not continues:
            raise ValueError("MoRModel: expected at least one token, got a batch of pads only")

        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        hidden = embedded = batch.pack(inputs_embeds)
        states: list[Tensor] = []
        if batch.packing.num_rows == 0:  # a chunk of pads: no layer has anything to do
            routing = RecursionOutput(hidden, batch.packing.positions)
            states = [hidden] * len(self.schedule.layers)
        else:
            call = DecoderPass(
                self.layers,
                self.schedule,
                batch,
                self._angles(hidden, batch.packing.positions),
                layers,
                keep_states=output_hidden_states,
                rotary_types=self.rotary_types,
                encoding=self.recursion_encoding,
            )
            hidden, routing = call.run_all(hidden, self.recursion, generating)
            states = call.states
        hidden = self.norm(hidden)
        before = layers[0].last_states if layers is not None else None
        if before is None and batch.past is not None and 0 in (batch.packing.lengths or ()):
            raise ValueError(
                "past_key_values: expected a token in every row after a crop, got a row of pads: "
                "the state of its last token is gone; crop one column more and feed it again"
            )
        unpacked = batch.unpack(hidden, before)
        if layers is not None:
            last = batch.last_positions()
            for layer in layers:
                layer.advance(last)
            last_states = unpacked[:, -1].detach()
            # A copy, lest the states of the whole prompt stay.
            layers[0].last_states = last_states.clone() if batch.shape[1] > 1 else last_states
        output = MoRModelOutput(
            last_hidden_state=unpacked,
            past_key_values=past_key_values if use_cache else None,
            hidden_states=(
                (*(batch.unpack(state) for state in (embedded, *states[:-1])), unpacked)
                if output_hidden_states
                else None
            ),
            token_depths=batch.unpack_masked(routing.depths, 0),
            aux_loss=routing.aux_loss,
            z_loss=routing.z_loss,
            balancing_loss=routing.balancing_loss,
            router_loss=_router_loss(routing, self.config),
            routing=routing,
        )
        hand_over(output.router_loss, self.training)
        return output.to_tuple() if wants_tuple(return_dict, self.config) else output

    def _angles(self, hidden: Tensor, positions: Tensor) -> Rotary:
        """Rotary cos and sin of all rows, for all recursions: some depend on the call's length."""
        at = hidden.unsqueeze(0), positions.unsqueeze(0)
        return {
            kind: self.rotary_emb(*at, *([] if kind is None else [kind]))
            for kind in dict.fromkeys(self.rotary_types)
        }

    def _uses_cache(self, use_cache: bool | None, cache: Cache | None, generating: bool) -> bool:
        """Whether this call fills a cache, given or new.

        Raises:
            ValueError: a cache where there can be none.
        """
        if use_cache is None:
            use_cache = cache is not None or (bool(self.config.use_cache) and not self.training)
        if self.training and torch.is_grad_enabled() and _is_checkpointed(self):
            if cache is not None:  # the recomputation would append twice
                raise ValueError(
                    "MoRModel: expected no past_key_values with gradient checkpointing in training"
                )
            _check_checkpointing(self)
            return False
        by_threshold = self.training and not generating and self.config.train_routing
        by_threshold = (by_threshold or self.config.eval_routing) == "threshold"
        if self.config.router == "expert" and not by_threshold:
            if cache is not None:
                raise ValueError(
                    'MoRModel: eval_routing="topk" ranks whole sequences, so it has no cache: pass '
                    'use_cache=False, or choose eval_routing="threshold"'
                )
            return False
        return bool(use_cache)


class MoRForCausalLM(TellsLostLosses, MoRPreTrainedModel, GenerationMixin):
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
    def _keys_to_ignore_on_save(self) -> set[str]:
        """A head that is the embedding is in no file, so the Trainer must not miss it there."""
        head = getattr(self.lm_head, "weight", None)
        tied = head is not None and head is getattr(self.get_input_embeddings(), "weight", None)
        return {"lm_head.weight"} if tied else set()

    @_keys_to_ignore_on_save.setter
    def _keys_to_ignore_on_save(self, names: Any) -> None:
        """Transformers collects those of submodules here; they have none."""

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
            labels: [B, S] int64, not shifted; -100 is ignored. A batch without targets adds 0.
            logits_to_keep: number of last columns (0: all), or their indices.
            num_items_in_batch: valid targets of the whole optimizer step, as the Trainer passes.
            return_dict: False gives a tuple; default `config.return_dict`.
            **kwargs: `shift_labels` [B, S], the target of every token as it is, instead of
                `labels`; and what `MoRModel.forward` takes.

        Raises:
            ValueError: see `MoRModel.forward`.
        """
        # Not in the signature: the Trainer would wait for every argument that is named a label.
        shift_labels = kwargs.pop("shift_labels", None)
        base: MoRModelOutput = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            return_dict=True,
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
        if labels is not None or shift_labels is not None:
            for name, targets in (("labels", labels), ("shift_labels", shift_labels)):
                if targets is not None and targets.shape != logits.shape[:2]:
                    raise ValueError(
                        f"{name}: expected shape {list(logits.shape[:2])} (one for every token "
                        f"with logits), got {list(targets.shape)}"
                    )
            count = num_targets(labels, shift_labels)
            items = count if num_items_in_batch is None else num_items_in_batch
            lm_loss = self.loss_function(
                logits=logits,
                labels=labels,
                vocab_size=self.config.vocab_size,
                num_items_in_batch=at_least_one(items),
                shift_labels=shift_labels,
            )
            loss = lm_loss.clone()  # the Trainer scales it in place
            if base.router_loss is not None:
                loss = lm_loss + batch_share(count, num_items_in_batch) * base.router_loss
                take_back(base.router_loss)
        else:
            tell_lost(base.router_loss, num_items_in_batch)
        output = MoRCausalLMOutput.of(base, logits, loss, lm_loss)
        return output.to_tuple() if wants_tuple(return_dict, self.config) else output

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Count positions from the mask, so that right padding works too."""
        inputs = super().prepare_inputs_for_generation(
            input_ids, attention_mask=attention_mask, inputs_embeds=inputs_embeds, **kwargs
        )
        if attention_mask is not None and attention_mask.dim() == 2:
            given = inputs["input_ids"] if inputs.get("inputs_embeds") is None else None
            columns = (inputs["inputs_embeds"] if given is None else given).shape[1]
            positions = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
            inputs["position_ids"] = positions[:, -columns:]
        inputs.pop("tokenizer", None)  # of stop_strings
        inputs["generating"] = True
        return inputs

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generate tokens, in training mode too; the cache is recursion-wise and grows.

        Raises:
            ValueError: a cache_implementation other than dynamic, or assistant_early_exit.
        """
        refuse_generation_options(self.generation_config, args, kwargs)
        return super().generate(*args, **kwargs)

    def generate_batch(self, *args: Any, **kwargs: Any) -> Any:
        """Transformers' continuous batching keeps every token in every layer's cache: refused.

        Raises:
            NotImplementedError: always; its cache would give wrong tokens without an error.
        """
        raise NotImplementedError(
            "MoR: generate_batch has no place for tokens that exit early; use generate()"
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


def _is_checkpointed(model: MoRModel) -> bool:
    return any(getattr(layer, "gradient_checkpointing", False) for layer in model.layers)


def _check_checkpointing(model: MoRModel) -> None:
    """Reentrant checkpoints cut the graph between the first and later uses of shared keys."""
    options = getattr(model.layers[0]._gradient_checkpointing_func, "keywords", {})
    if model.config.kv_strategy != "recursion" and options.get("use_reentrant") is True:
        raise ValueError(
            f"MoRModel: kv_strategy {model.config.kv_strategy} needs gradient checkpointing with "
            "use_reentrant=False"
        )


def _check_cache(cache: Cache, config: MoRConfig) -> None:
    layers = getattr(cache, "layers", [])
    if getattr(cache, "offloading", False):
        raise ValueError(
            "past_key_values: expected a cache without offloading, which is not supported"
        )
    if len(layers) != config.num_hidden_layers or not all(
        isinstance(layer, RecursionCacheLayer) for layer in layers
    ):
        kinds = sorted({type(layer).__name__ for layer in layers}) or ["none"]
        raise ValueError(
            f"past_key_values: expected DynamicCache(config=model.config) with "
            f"{config.num_hidden_layers} RecursionCacheLayer, got {len(layers)} layers of {kinds}"
        )


# By these names Transformers' Trainer and tests know what a model is: whose labels it shifts.
MODEL_MAPPING_NAMES["mor"] = "MoRModel"
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["mor"] = "MoRForCausalLM"
AutoConfig.register("mor", MoRConfig, exist_ok=True)
AutoModel.register(MoRConfig, MoRModel, exist_ok=True)
AutoModelForCausalLM.register(MoRConfig, MoRForCausalLM, exist_ok=True)
