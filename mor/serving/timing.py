"""Times of a model's passes: measured on one machine, kept in a file, and read on any other."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mor._host import Plan
from mor.serving.curves import measure_curves
from mor.serving.engine import CHUNK, Engine
from mor.serving.forward import PackedModel

__all__ = ["DTYPES", "Timing", "model_shape", "windowed_shares"]

DTYPES = ("float32", "bfloat16", "float16")
_CURVES = ("block", "enter", "ends")
#: Keys of the rows whose attention is measured.
_CONTEXT = 512


@dataclass(frozen=True)
class Timing:
    """Measured seconds of the passes of a model on a machine.

    Attributes:
        model: that was measured; see `model_shape`.
        device: "cpu" or "cuda".
        dtype: of the model, as "float32".
        threads: of PyTorch, on the CPU.
        curves: (rows, seconds) by name, of rows without context; see `measure_curves`.
        key_seconds: seconds of attention for each key that a row sees, by name; of a pass some of
            whose layers have a window, for the mean over its layers.
    """

    model: dict[str, Any]
    device: str
    dtype: str
    threads: int
    curves: dict[str, list[tuple[float, float]]]
    key_seconds: dict[str, float]

    @classmethod
    def measure(cls, engine: Engine) -> "Timing":
        """Measures an idle engine, whose cached prefixes are lost."""
        packed = engine.packed
        rows = engine.scheduler.num_slots
        measure = partial(measure_curves, packed, engine.pool, engine.states, rows, kinds=_CURVES)
        context = min(_CONTEXT, packed.max_length)
        curves = measure()
        far = measure(context=context)
        key_seconds = {}
        outside = max(0, context - (packed.window or context))
        shares = windowed_shares(packed)
        for name, curve in curves.items():
            more = sum(b - a for (_, a), (_, b) in zip(curve, far[name], strict=True))
            keys = sum(rows for rows, _ in curve) * (context - 1 - shares[name] * outside)
            key_seconds[name] = max(0.0, more / keys) if keys else 0.0
        dtype = str(packed.dtype).removeprefix("torch.")
        threads = torch.get_num_threads()
        return cls(model_shape(packed), packed.device.type, dtype, threads, curves, key_seconds)

    @classmethod
    def read(cls, path: Path) -> "Timing":
        """Reads what `mor analyze --serving --json` printed, on whatever machine.

        Raises:
            ValueError: another file.
        """
        try:
            found = json.loads(path.read_text(encoding="utf-8"))["timing"]
            curves, seconds = (
                {name: found[key][name] for name in _CURVES} for key in ("curves", "key_seconds")
            )
            pairs = {
                name: [(float(rows), float(second)) for rows, second in curve]
                for name, curve in curves.items()
            }
            model, device, dtype, threads = (
                found[name] for name in ("model", "device", "dtype", "threads")
            )
            timing = cls(model, device, dtype, threads, pairs, seconds)
            if device not in CHUNK or dtype not in DTYPES or not all(pairs.values()):
                raise ValueError
            if not isinstance(model, dict) or not isinstance(threads, int):
                raise ValueError
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path}: expected what mor analyze --serving --json printed, got another file"
            ) from error
        return timing

    def check_model(self, packed: PackedModel) -> None:
        """Refuses the times of another model.

        Raises:
            ValueError: naming what differs.
        """
        expected = model_shape(packed)
        others = [name for name, value in expected.items() if self.model.get(name) != value]
        if others:
            here, there = (
                ", ".join(f"{name} {shape.get(name)}" for name in others)
                for shape in (expected, self.model)
            )
            raise ValueError(
                f"timing: expected times of this model, with {here}, got those of "
                f"one with {there}: measure again"
            )

    def seconds(self, plan: Plan, windowed: Mapping[str, float]) -> float:
        """Seconds of a pass, with attention over the keys that its rows see.

        Args:
            plan: of the pass.
            windowed: share of the layers with a window, by name of a curve.
        """
        if plan.kind == "idle":
            return 0.0
        context, outside = int(plan.context_lens.sum()), int(plan.context_starts.sum())
        keys = {name: context - share * outside for name, share in windowed.items()}
        if plan.kind == "exit":  # rows without logits cost next to nothing
            rows = max(1, plan.num_logit_rows)
            return max(0.0, self._at("ends", rows, keys) - self._at("enter", rows, keys))
        return self._at(plan.kind, plan.num_rows, keys)

    def _at(self, name: str, rows: int, keys: Mapping[str, float]) -> float:
        counts, seconds = zip(*self.curves[name], strict=True)
        beyond = max(1.0, rows / counts[-1])  # more rows take longer in proportion
        passed = float(np.interp(rows, counts, seconds)) * beyond
        return passed + keys[name] * self.key_seconds[name]


def model_shape(packed: PackedModel) -> dict[str, Any]:
    """The sizes that times of a model's passes depend on, in the words of its configuration."""
    return {
        "num_hidden_layers": len(packed.block) * packed.num_steps + 2 * packed.has_ends,
        "hidden_size": packed.hidden_size,
        "intermediate_size": packed.block[0].weights[0].gate_up.num_outputs // 2,
        "num_attention_heads": packed.num_heads,
        "num_key_value_heads": packed.num_kv_heads,
        "head_dim": packed.head_dim,
        "vocab_size": packed.vocab_size,
        "sliding_window": packed.window,
        "num_recursions": packed.num_steps * packed.recursions_per_step,
        "router": packed.routing,
        "kv_strategy": packed.kv_strategy,
        "relaxed": not packed.mixes_recursions,
    }


def windowed_shares(packed: PackedModel) -> dict[str, float]:
    """Share of the layers with a window, by name of a curve."""
    first, last = (layer is not None and layer.windowed for layer in (packed.first, packed.last))
    block = [layer.windowed for layer in packed.block]
    return {"block": sum(block) / len(block), "enter": float(first), "ends": (first + last) / 2}
