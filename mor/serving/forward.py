"""The passes of the engine: a model's own weights on packed rows at different recursion steps."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mor.models.attention import windows
from mor.models.configuration_mor import ARCHITECTURES, MoRConfig
from mor.models.derived_class import Derived
from mor.models.swap.settings import caller_of
from mor.modules.expert_choice import ExpertChoice
from mor.modules.routers import apply_gate
from mor.modules.token_choice import TokenChoice
from mor.ops.kv_append import kv_append
from mor.ops.paged_depth_attention import paged_depth_attention
from mor.ops.scatter_tokens import scatter_tokens_
from mor.serving.memory import KVPool, States
from mor.serving.routing import ExpertRouting, TokenRouting
from mor.serving.weights import LayerWeights, Norm, Product, RotaryTable, read_layer, read_norm

__all__ = ["PackedModel", "Rows"]

_Angles = dict[str | None, tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Rows:
    """Rows of one pass, and the entries of the cache they attend over: what a `Plan` says.

    An entry is one sequence in this pass with its row of `block_table`; its rows are neighbours, in
    order of position. In a block pass rows are sorted by recursion.

    Attributes:
        slots: [N] int64 place of each row in `States`.
        positions: [N] int64 position in its sequence.
        slot_mapping: [N] int64 place of its keys and values; negative: none.
        block_table: [B, max_blocks] int32 blocks of each entry.
        context_lens: [N] int32 keys that each row sees, its own among them (exit: of the first
            `num_logit_rows` rows, which alone attend; so are the two that follow).
        cu_seqlens: [B + 1] int32 rows of each entry.
        context_starts: [N] int32 first key inside the window; None without windows.
        thresholds: [N] float32 that the logits of expert-choice must exceed; None: 0.
        recursions: [N] int64, from 1; only of a block pass.
        recursion_offsets: [R + 1] rows of recursion r are offsets[r - 1] to offsets[r] - 1; only of
            a block pass.
        write_through: [C, N] int64 further places of keys and values (hybrid: recursion 1 fills
            every group); None: none.
        max_recursions: [N] int64 bound of each row's depth; only where rows enter a token-choice
            model, which chooses the best depth up to it; None: R.
        num_logit_rows: the first rows of an exit pass, whose logits are wanted; None: all.
    """

    slots: Tensor
    positions: Tensor
    slot_mapping: Tensor
    block_table: Tensor
    context_lens: Tensor
    cu_seqlens: Tensor
    context_starts: Tensor | None = None
    thresholds: Tensor | None = None
    recursions: Tensor | None = None
    recursion_offsets: Sequence[int] = ()
    write_through: Tensor | None = None
    max_recursions: Tensor | None = None
    num_logit_rows: int | None = None

    @classmethod
    def of(cls, plan: Any, device: torch.device, max_recursions: Tensor | None = None) -> "Rows":
        """The rows of a scheduler's `Plan`, on the model's device."""

        def tensor(values: Any) -> Tensor:
            return torch.from_numpy(values).to(device)

        def where_given(values: Any) -> Tensor | None:
            return tensor(values) if values.size else None

        block = plan.kind == "block"
        return cls(
            tensor(plan.slots),
            tensor(plan.positions),
            tensor(plan.slot_mapping),
            tensor(plan.block_table),
            tensor(plan.context_lens),
            tensor(plan.cu_seqlens),
            where_given(plan.context_starts),
            where_given(plan.thresholds),
            tensor(plan.recursions).long() if block else None,
            plan.recursion_offsets.tolist(),
            where_given(plan.write_through),
            max_recursions,
            plan.num_logit_rows if plan.kind == "exit" else None,
        )


@dataclass(frozen=True)
class _Layer:
    """One layer of a pass.

    Attributes:
        weights: for each recursion, or one for all.
        keys: index of its keys and values among the layers of the group.
        appends: "all" its rows, those of the "first" recursion, or "none" of them.
        windowed: it sees the keys of the window alone.
        encoding: [num_steps, D] factor of its output by recursion, or None.
    """

    weights: Sequence[LayerWeights]
    keys: int
    appends: str
    windowed: bool
    encoding: Tensor | None


class PackedModel:
    """A causal language model as three passes over packed rows.

    `run_enter` takes tokens to their first recursion (embedding, first layer, router), `run_block`
    takes rows of any recursion through the shared block (and routes them on), `run_exit` takes rows
    to their logits (last layer, norm, head). Weights are copied at construction; routing is that of
    evaluation.

    A model without router has one step, of all layers between the first and the last.

    Args:
        model: a `MoRForCausalLM`, or a dense model of an architecture that `MoRConfig` takes.
        max_length: positions at most; default the configuration's.
        deterministic: the results of a row do not depend on the rows beside it, to the last bit:
            products are computed in tiles of one size, and each row attends alone.

    Attributes:
        num_steps: recursions that the scheduler plans; 1 without router.
        recursions_per_step: what one of them counts in a token's depth; R without router.
        routing: "expert" (each pass says which rows go on), "token" (`run_enter` says every row's
            depth) or None (every row takes the one step).
        num_groups: middle groups of keys and values: `num_steps`, or 1 with kv_strategy "shared".
        num_kv_layers: layers of a middle group that own keys and values.
        has_ends: the first and last layer have keys and values of their own.
        kv_strategy: "recursion", "shared" or "hybrid".
        mixes_recursions: a block pass takes rows of several recursions (not with relaxation).
        window: of the layers that have one; None: no layer has.
        dtype, device, hidden_size, vocab_size, max_length: of the model.

    Raises:
        ValueError: a model that it cannot run, in one sentence.

    Reference: MoR paper, section 2.2 (routing, recursion-wise caching) and its continuous
    depth-wise batching.
    """

    def __init__(
        self, model: Any, max_length: int | None = None, deterministic: bool = False
    ) -> None:
        _check_model(model)
        config, inner = model.config, model.model
        self.deterministic = deterministic
        self.recursive = isinstance(config, MoRConfig)
        self.vocab_size, self.hidden_size = config.vocab_size, config.hidden_size
        self.embedding = inner.embed_tokens
        weight = self.embedding.weight
        self.dtype, self.device = weight.dtype, weight.device
        attention = inner.layers[0].self_attn
        self.head_dim = attention.head_dim
        self.num_heads = config.num_attention_heads
        self.num_kv_heads = config.num_key_value_heads
        self.norm: Norm = read_norm(inner.norm)
        self.head = Product([model.lm_head.weight], [model.lm_head.bias], deterministic)
        self._read_routing(inner, config)
        self._read_layers(inner, config)
        self.max_length = max_length or config.max_position_embeddings
        self.rotary = RotaryTable(
            inner.rotary_emb, self._rotary_kinds, self.max_length, weight, self.head_dim
        )

    def new_pool(self, num_blocks: int, block_size: int) -> KVPool:
        """A pool of key/value blocks; see `KVPool`."""
        return KVPool(
            num_blocks,
            block_size,
            self.num_kv_layers,
            self.has_ends,
            self.num_kv_heads,
            self.head_dim,
            self.dtype,
            self.device,
        )

    def new_states(self, num_slots: int) -> States:
        """States of at most `num_slots` rows in flight."""
        chained = self.routing == "token"
        return States(num_slots, self.hidden_size, self.dtype, chained, self.device)

    @torch.inference_mode()
    def run_enter(self, tokens: Tensor, rows: Rows, states: States, pool: KVPool) -> Tensor | None:
        """Takes new tokens to their first recursion.

        Args:
            tokens: [N] int64.
            rows: of them; the entries are those of the group of the ends.
            states: filled at the rows' slots.
            pool: gets keys and values of the first layer.

        Returns:
            Expert-choice: [N] bool, whether each row takes the first recursion. Token-choice: [N]
            int64 depths. Without router None: every row takes the one step.
        """
        x = self.embedding(tokens)
        if self.first is not None:
            rows = self._prepare(rows)
            angles = self.rotary(rows.positions)
            x = self._run_layer(self.first, 0, x, rows, pool.ends[0], angles, x.shape[0])
        states.hidden[rows.slots] = x
        if self.token is not None:
            assert states.chain is not None and states.depths is not None
            depths, gates = self.token(x, rows.positions, rows.max_recursions)
            states.chain[rows.slots] = x
            states.depths[rows.slots] = depths
            states.gates[rows.slots] = gates.to(states.gates.dtype)
            return depths
        return self._route(x, torch.zeros_like(rows.slots), rows, states)

    @torch.inference_mode()
    def run_block(self, rows: Rows, states: States, pool: KVPool) -> Tensor | None:
        """Takes rows through the shared block once.

        Args:
            rows: sorted by recursion; the entries are those of the middle groups.
            states: updated at the rows' slots.
            pool: gets keys and values of the rows that have a place there.

        Returns:
            Expert-choice: [N] bool, whether each row takes the recursion after this one. Otherwise
            None: depths are known.
        """
        ends = rows.recursion_offsets
        used = [step for step in range(self.num_steps) if ends[step + 1] > ends[step]]
        if len(used) > 1 and not self.mixes_recursions:
            raise ValueError(
                "run_block: with relaxation each recursion has weights of its own: expected rows "
                f"of one recursion, got rows of {len(used)}"
            )
        rows = self._prepare(rows)
        angles = self.rotary(rows.positions)
        source = states.hidden if states.chain is None else states.chain
        x = before = source.index_select(0, rows.slots)
        step = used[0] if used else 0
        appending = {"all": x.shape[0], "first": ends[1], "none": 0}
        for layer in self.block:
            cache = pool.middle[layer.keys]
            x = self._run_layer(layer, step, x, rows, cache, angles, appending[layer.appends])
        return self._combine(before, x, rows, states)

    @torch.inference_mode()
    def run_exit(self, rows: Rows, states: States, pool: KVPool) -> Tensor:
        """Takes rows to their logits.

        Args:
            rows: the last layer's; the entries are those of the group of the ends. Rows after the
                first `num_logit_rows` (of a prompt, but for its last) only leave their keys and
                values for later tokens.
            states: of the rows.
            pool: gets keys and values of the last layer, of every row.

        Returns:
            Logits [num_logit_rows, V] in the model's dtype.
        """
        count = rows.slots.shape[0] if rows.num_logit_rows is None else rows.num_logit_rows
        x = states.hidden.index_select(0, rows.slots)
        if self.last is not None:
            rows = self._prepare(rows)
            layer, cache, angles = self.last, pool.ends[1], self.rotary(rows.positions)
            weights = layer.weights[0]
            normed = weights.before_attention(x)
            self._append(weights, normed, rows, cache, angles, x.shape[0])
            if count:
                q = self._queries(weights, normed[:count], _first(angles, count))
                x = self._attend(layer, weights, x[:count], q, rows, cache)
        return self.head(self.norm(x[:count])) if count else x.new_empty(0, self.vocab_size)

    def _run_layer(
        self,
        layer: _Layer,
        step: int,
        x: Tensor,
        rows: Rows,
        cache: tuple[Tensor, Tensor],
        angles: _Angles,
        appending: int,
    ) -> Tensor:
        """One decoder layer; the first `appending` rows have keys and values of their own."""
        weights = layer.weights[step if len(layer.weights) > 1 else 0]
        normed = weights.before_attention(x)
        if weights.qkv is not None:
            heads = self.num_heads + self.num_kv_heads
            qkv = weights.qkv(normed).view(x.shape[0], -1, self.head_dim)
            qk = qkv[:, :heads]
            qk = qk if weights.qk_norm is None else weights.qk_norm(qk)
            qk = _rotate(weights, qk, angles)
            q = qk[:, : self.num_heads]
            _append(cache, qk[:, self.num_heads :], qkv[:, heads:], rows)
        else:
            q = self._queries(weights, normed, angles)
            if appending:
                self._append(weights, normed, rows, cache, angles, appending)
        x = self._attend(layer, weights, x, q, rows, cache)
        if layer.encoding is not None:
            assert rows.recursions is not None
            x = x * layer.encoding[rows.recursions - 1]
        return x

    def _queries(self, weights: LayerWeights, normed: Tensor, angles: _Angles) -> Tensor:
        """Queries [N, H, head_dim]."""
        assert weights.q is not None
        q = weights.q(normed).view(normed.shape[0], -1, self.head_dim)
        q = q if weights.q_norm is None else weights.q_norm(q)
        return _rotate(weights, q, angles)

    def _append(
        self,
        weights: LayerWeights,
        normed: Tensor,
        rows: Rows,
        cache: tuple[Tensor, Tensor],
        angles: _Angles,
        count: int,
    ) -> None:
        """Appends keys and values of the first `count` rows."""
        assert weights.kv is not None
        kv = weights.kv(normed[:count]).view(count, -1, self.head_dim)
        k = kv[:, : self.num_kv_heads]
        k = k if weights.k_norm is None else weights.k_norm(k)
        k = _rotate(weights, k, _first(angles, count))
        _append(cache, k, kv[:, self.num_kv_heads :], rows)

    def _attend(
        self,
        layer: _Layer,
        weights: LayerWeights,
        x: Tensor,
        q: Tensor,
        rows: Rows,
        cache: tuple[Tensor, Tensor],
    ) -> Tensor:
        """The layer from its queries on: attention, its residual stream, and the MLP."""
        attended, _ = paged_depth_attention(
            q,
            cache[0],
            cache[1],
            rows.block_table,
            rows.context_lens,
            rows.cu_seqlens,
            context_starts=rows.context_starts if layer.windowed else None,
            scale=weights.scale,
        )
        y = weights.output(attended.view(x.shape[0], -1))
        x = x + (y if weights.after_attention is None else weights.after_attention(y))
        gate, up = weights.gate_up(weights.before_mlp(x)).chunk(2, dim=-1)
        y = weights.down(weights.activation(gate).mul_(up))
        return x + (y if weights.after_mlp is None else weights.after_mlp(y))

    def _combine(self, before: Tensor, after: Tensor, rows: Rows, states: States) -> Tensor | None:
        """Adds the block's result to the states and routes the rows on."""
        if self.expert is None and self.token is None:
            states.hidden[rows.slots] = after
            return None
        assert rows.recursions is not None
        gates = states.gates.index_select(0, rows.slots)
        if self.token is not None:
            assert states.chain is not None and states.depths is not None
            states.chain[rows.slots] = after
            # The result of a row's last recursion counts, against the state it entered with. Rows
            # that go on add nothing: no index to wait for.
            before = states.hidden.index_select(0, rows.slots)
            gates = gates * (states.depths.index_select(0, rows.slots) == rows.recursions)
            update, _ = apply_gate(self.gating, before, after, gates)
            scatter_tokens_(states.hidden, update, rows.slots, gates)
            return None
        update, gate = apply_gate(self.gating, before, after, gates)
        scatter_tokens_(states.hidden, update, rows.slots, gate)
        if rows.recursion_offsets[-2] == 0:  # nobody has another recursion
            return torch.zeros_like(rows.slots, dtype=torch.bool)
        return self._route(states.hidden.index_select(0, rows.slots), rows.recursions, rows, states)

    def _route(self, hidden: Tensor, steps: Tensor, rows: Rows, states: States) -> Tensor | None:
        if self.expert is None:
            return None
        goes_on, gates = self.expert(hidden, steps, rows.positions, rows.thresholds)
        states.gates[rows.slots] = gates.to(states.gates.dtype)
        return goes_on

    def _prepare(self, rows: Rows) -> Rows:
        """With `deterministic` every query is an entry of its own."""
        if not self.deterministic:
            return rows
        num = rows.context_lens.shape[0]
        device = rows.block_table.device
        entries = torch.arange(rows.block_table.shape[0], device=device)
        entries = entries.repeat_interleave(rows.cu_seqlens.diff())
        each = torch.arange(num + 1, dtype=torch.int32, device=device)
        return replace(rows, block_table=rows.block_table[entries], cu_seqlens=each)

    def _read_routing(self, inner: Any, config: Any) -> None:
        module = inner.recursion if self.recursive else None
        self.gating = module.gating if module is not None else "weighted"
        self.expert = self.token = None
        if isinstance(module, ExpertChoice):
            self.expert = ExpertRouting(module, self.deterministic)
        if isinstance(module, TokenChoice):
            self.token = TokenRouting(module, self.deterministic)
        self.routing: str | None = config.router if module is not None else None
        recursions = config.num_recursions if self.recursive else 1
        self.num_steps = recursions if module is not None else 1
        self.recursions_per_step = recursions // self.num_steps
        self.kv_strategy: str = config.kv_strategy if self.recursive else "recursion"
        self.num_groups = 1 if self.kv_strategy == "shared" else self.num_steps

    def _read_layers(self, inner: Any, config: Any) -> None:
        depth = config.num_hidden_layers
        schedule = config.layer_schedule if self.recursive else list(range(depth))
        uses = config.layer_uses if self.recursive else [0] * depth
        seen = windows(config.base_config if self.recursive else config)
        relaxed = self.recursive and config.relaxation is not None
        encoded = config.encoded_depths if self.recursive else []
        encoding = inner.recursion_encoding if self.recursive else None
        # Where the ends are used once: not of the cycles, and not of two dense layers or fewer.
        self.has_ends = config.schedule.num_ends == 1 if self.recursive else depth > 2
        self.mixes_recursions = not (relaxed and self.num_steps > 1)
        if getattr(inner.rotary_emb, "layer_types", None) is None:
            kinds: list[str | None] = [None] * len(inner.layers)
        else:
            kinds = [layer.self_attn.layer_type for layer in inner.layers]
        self._rotary_kinds = kinds
        made: dict[tuple[int, int, bool], LayerWeights] = {}

        def weights_of(unique: int, use: int, splits_kv: bool) -> LayerWeights:
            key = unique, use if relaxed else 0, splits_kv
            if key not in made:
                made[key] = read_layer(
                    inner.layers[unique],
                    key[1],
                    rotary=kinds[unique],
                    splits_kv=splits_kv,
                    deterministic=self.deterministic,
                )
            return made[key]

        def end(at: int, splits_kv: bool) -> _Layer | None:
            if not self.has_ends:
                return None
            unique = schedule[at]
            weights = [weights_of(unique, 0, splits_kv)]
            return _Layer(weights, 0, "all", seen[at] is not None, None)

        self.first, self.last = end(0, False), end(-1, True)
        middle = range(1, depth - 1) if self.has_ends else range(depth)
        per_step = len(middle) // self.num_steps
        self.block: list[_Layer] = []
        owners: dict[int, int] = {}  # index of the keys of each unique layer's first use
        shares = self.kv_strategy == "shared"
        for at in middle[:per_step]:
            unique, use = schedule[at], uses[at]
            appends = "all"
            if shares and unique in owners:
                appends = "none"
            elif shares and self.num_steps > 1:
                appends = "first"
            keys = owners[unique] if appends == "none" else len(set(owners.values()))
            if appends != "none":
                owners[unique if shares else at] = keys
            steps = range(self.num_steps if relaxed else 1)
            vectors = None
            if encoding is not None and at in encoded:
                vectors = encoding.detach()[encoded.index(at) :][: self.num_steps]
            self.block.append(
                _Layer(
                    [weights_of(unique, use + step, appends != "all") for step in steps],
                    keys,
                    appends,
                    seen[at] is not None,
                    vectors,
                )
            )
        self.num_kv_layers = len(set(owners.values()))
        self.window: int | None = next((window for window in seen if window), None)


def _append(cache: tuple[Tensor, Tensor], k: Tensor, v: Tensor, rows: Rows) -> None:
    """Appends keys and values [n, Hkv, head_dim] of the first n rows, with all their copies."""
    count = k.shape[0]
    kv_append(cache[0], cache[1], k, v, rows.slot_mapping[:count])
    if rows.write_through is not None:
        for places in rows.write_through:
            kv_append(cache[0], cache[1], k, v, places[:count])


def _first(angles: _Angles, count: int) -> _Angles:
    return {kind: (cos[:count], sin[:count]) for kind, (cos, sin) in angles.items()}


def _rotate(weights: LayerWeights, x: Tensor, angles: _Angles) -> Tensor:
    """Rotates heads [N, heads, head_dim] by their positions."""
    if not weights.rotates:
        return x
    cos, sin = angles[weights.rotary]
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


def _check_model(model: Any) -> None:
    config = getattr(model, "config", None)
    name, kind = type(model).__name__, getattr(config, "model_type", None)
    if isinstance(model, Derived):
        settings = getattr(config, "mor_swap", None)
        raise ValueError(
            f"PackedModel: expected a MoR or a dense model, got a {name} that "
            f"{caller_of(settings) if settings else 'an apply_ function'} changed, which only its "
            "own generate runs; served is what MoRForCausalLM.from_dense makes of the dense model"
        )
    supported = (MoRConfig.model_type, *ARCHITECTURES, "smollm3")
    if kind not in supported or not hasattr(model, "lm_head") or not hasattr(model, "model"):
        raise ValueError(
            f"PackedModel: expected a causal language model of {supported}, got {name}"
        )
    assert config is not None
    for option in (
        "attn_logit_softcapping",
        "final_logit_softcapping",
        "use_bidirectional_attention",
    ):
        if getattr(config, option, None):
            raise ValueError(
                f"PackedModel: {option} is not supported, got {getattr(config, option)}"
            )
    if kind == MoRConfig.model_type and config.router == "expert":
        if config.eval_routing == "topk":
            raise ValueError(
                'PackedModel: eval_routing="topk" ranks whole sequences, so it has no cache: '
                'choose eval_routing="threshold"'
            )
