"""Routers: the small networks that score tokens, and the losses that train them."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = [
    "Float32Linear",
    "RandomRouter",
    "Router",
    "RouterScore",
    "apply_gate",
    "aux_loss",
    "balancing_loss",
    "count_choices",
    "refuse_nan",
    "z_loss",
]

ROUTER_TYPES = ("linear", "mlp", "wide_mlp", "random")
GATINGS = ("weighted", "additive", "residual")
SCORE_FUNCTIONS = ("sigmoid", "tanh", "softmax", "none")
_WIDTHS = {"mlp": 2, "wide_mlp": 4}


class Float32Linear(nn.Linear):
    """A linear layer whose product is taken in float32 (float64 for float64 input).

    The weight keeps the model's dtype. It is read here alone, when the layer is called, so that
    adapters, quantisers, offloading and parametrisations find an ordinary linear layer.
    """

    def forward(self, x: Tensor) -> Tensor:
        """[N, in_features] to [N, out_features] in float32."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        bias = None if self.bias is None else self.bias.to(dtype)
        return functional.linear(x.to(dtype), self.weight.to(dtype), bias)


class Router(nn.Module):
    """Scores tokens: [N, D] to logits [N, num_outputs] in float32, whatever the model's dtype.

    float32 because bfloat16 logits tie as soon as a router is confident (paper, section 2.2.1;
    ranking logits in float32 selects the same tokens without the ties).

    Args:
        hidden_size: the width D.
        num_outputs: 1 for expert-choice, the number of recursions for token-choice.
        router_type: "linear", "mlp" (hidden size 2D) or "wide_mlp" (4D), GELU, no biases.
        temperature: the router reads hidden / temperature.
        std: standard deviation of the initial weights.

    Raises:
        ValueError: an unknown router_type or a temperature that is not positive.
    """

    def __init__(
        self,
        hidden_size: int,
        num_outputs: int = 1,
        router_type: str = "linear",
        temperature: float = 1.0,
        std: float = 0.02,
    ) -> None:
        super().__init__()
        if router_type != "linear" and router_type not in _WIDTHS:
            raise ValueError(f"router_type: expected one of {ROUTER_TYPES}, got {router_type!r}")
        if not temperature > 0:
            raise ValueError(f"temperature: expected a positive number, got {temperature}")
        self.temperature = temperature
        if router_type == "linear":
            self.layers = nn.ModuleList([Float32Linear(hidden_size, num_outputs, bias=False)])
        else:
            width = _WIDTHS[router_type] * hidden_size
            self.layers = nn.ModuleList(
                [
                    Float32Linear(hidden_size, width, bias=False),
                    Float32Linear(width, num_outputs, bias=False),
                ]
            )
        for layer in self.layers:
            nn.init.normal_(layer.get_parameter("weight"), std=std)

    def forward(
        self, hidden: Tensor, positions: Tensor | None = None, learns: bool = False
    ) -> Tensor:
        """Logits [N, num_outputs] float32 of the tokens [N, D]; the rest is `RandomRouter`'s."""
        with torch.autocast(hidden.device.type, enabled=False):
            x = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
            if self.temperature != 1.0:
                x = x / self.temperature
            for i, layer in enumerate(self.layers):
                x = layer(functional.gelu(x) if i else x)
            # A quantised layer answers in a dtype of its own.
            return x.to(torch.promote_types(x.dtype, torch.float32))


class RandomRouter(nn.Module):
    """Scores that know nothing of the token: uniform in [0, 1), the ablation's baseline.

    New ones in every call that learns. Otherwise they are a hash of the token's position (and
    of `step`, the output, the seed): causal, and the same with and without a cache.

    Args:
        num_outputs: scores per token.
        step: tells the routers of a model apart.
        seed: of the hash.
    """

    def __init__(self, num_outputs: int = 1, step: int = 0, seed: int = 0) -> None:
        super().__init__()
        self.num_outputs, self.step, self.seed = num_outputs, step, seed

    def forward(self, hidden: Tensor, positions: Tensor, learns: bool = False) -> Tensor:
        """Scores [N, num_outputs] float32 of the tokens [N, D] at positions [N]."""
        if learns:
            shape = (hidden.shape[0], self.num_outputs)
            return torch.rand(shape, dtype=torch.float32, device=hidden.device)
        outputs = torch.arange(self.num_outputs, device=hidden.device)
        counter = positions.unsqueeze(1) * 65537 + self.step * 257 + outputs
        # The finaliser of SplitMix64, in int64 arithmetic that wraps around.
        x = (counter + self.seed + 1) * -7046029254386353131
        x = (x ^ _shift(x, 30)) * -4658895280553007687
        x = (x ^ _shift(x, 27)) * -7723592293110705685
        x = x ^ _shift(x, 31)
        return _shift(x, 40).to(torch.float32) / 2**24


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical shift to the right."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


@dataclass(frozen=True)
class RouterScore:
    """Turns logits into gates: alpha * function(logit).

    Attributes:
        function: "sigmoid", "tanh", "softmax" (over the outputs) or "none".
        alpha: factor; the paper uses 0.1 for expert-choice, 1 for softmax token-choice.
    """

    function: str
    alpha: float

    def __post_init__(self) -> None:
        if self.function not in SCORE_FUNCTIONS:
            raise ValueError(
                f"score: expected a function of {SCORE_FUNCTIONS}, got {self.function!r}"
            )
        if not isinstance(self.alpha, int | float) or not 0 < self.alpha < math.inf:
            raise ValueError(f"score: expected a positive number as alpha, got {self.alpha!r}")

    def __call__(self, logits: Tensor) -> Tensor:
        """Scores of the shape of logits."""
        if self.function == "sigmoid":
            logits = logits.sigmoid()
        elif self.function == "tanh":
            logits = logits.tanh()
        elif self.function == "softmax":
            logits = logits.softmax(dim=-1)
        return self.alpha * logits


def apply_gate(
    gating: str, before: Tensor, after: Tensor, gates: Tensor
) -> tuple[Tensor, Tensor | None]:
    """What is added to the residual stream, and the factor on it.

    Args:
        gating: "weighted": g f(H), "additive": f(H), both with f's own residual stream inside, as
            the paper; "residual": g (f(H) - H), with which g = 1 is f(H), as a dense model.
        before: [K, D] states that went into the block.
        after: [K, D] f of them.
        gates: [K].
    """
    if gating == "residual":
        return after - before, gates
    return after, gates if gating == "weighted" else None


def refuse_nan(scores: Tensor, where: str) -> None:
    """Raises RuntimeError for NaN scores, which would route tokens silently somewhere.

    On the CPU only, as `route_topk`: elsewhere it would cost a synchronisation.
    """
    if scores.device.type == "cpu" and not torch.compiler.is_compiling() and scores.isnan().any():
        raise RuntimeError(f"{where}: expected router scores without NaN, got NaN")


def aux_loss(logits: Tensor, rows: Tensor) -> Tensor:
    """Trains the router's own threshold: mean binary cross-entropy, target 1 for selected tokens.

    Args:
        logits: [C] logits of the candidates.
        rows: [K] the candidates that were selected.

    Reference: MoR paper, section 2.2.1 (auxiliary loss against the causality violation).
    """
    target = torch.zeros_like(logits).index_fill(0, rows, 1.0)
    total = functional.binary_cross_entropy_with_logits(logits, target, reduction="sum")
    return total / max(logits.shape[0], 1)


def count_choices(choice: Tensor, num_outputs: int) -> Tensor:
    """[R] int64: how many of the tokens [N] chose each output.

    Not bincount, whose size depends on data: that would wait for the device and not compile.
    """
    return (choice.unsqueeze(1) == torch.arange(num_outputs, device=choice.device)).sum(dim=0)


def balancing_loss(scores: Tensor, choice: Tensor) -> Tensor:
    """Balances token-choice: sum over the outputs of f_i * P_i; 1 at perfect balance (alpha 1).

    Args:
        scores: [N, R] scores including alpha.
        choice: [N] chosen output of each token.

    Reference: MoR paper, section 2.2.1 (balancing loss).
    """
    num_tokens, num_outputs = scores.shape
    if num_tokens == 0:
        return scores.sum()
    counts = count_choices(choice, num_outputs).to(scores.dtype)
    return (counts * (num_outputs / num_tokens) * scores.mean(dim=0)).sum()


def z_loss(logits: Tensor) -> Tensor:
    """Keeps logits small: mean over the tokens of logsumexp(logits)^2; logits [N, R]."""
    # Of one logit it is the logit; torch.export cannot trace logsumexp without knowing of any rows.
    log_sum = logits[:, 0] if logits.shape[1] == 1 else logits.logsumexp(dim=-1)
    return log_sum.square().sum() / max(logits.shape[0], 1)
