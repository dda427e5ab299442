from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from mor.ops import scatter_tokens, scatter_tokens_
from tests.support.operators import check_bad_input


@pytest.mark.parametrize("op", [scatter_tokens, scatter_tokens_])
def test_bad_input(op: Any) -> None:
    base, updates, rows = torch.zeros(4, 3), torch.ones(2, 3), torch.tensor([2, 0])
    gate, scale, meta = torch.ones(2), torch.ones(4), "meta"
    name = op.__name__
    for message, bad in (
        (rf"{name}: expected base of shape \[N, D\], got \[4\]", {"base": base[:, 0]}),
        (rf"{name}: expected base of dtype float32, .*, got int64", {"base": base.long()}),
        (rf"{name}: expected updates of shape \[K, D\], got \[3\]", {"updates": updates[0]}),
        (r"expected updates of dtype float32, got float16", {"updates": updates.half()}),
        (r"expected updates of shape \[2, 3\], got \[2, 2\]", {"updates": updates[:, 1:]}),
        (r"expected updates of shape \[1, 3\], got \[2, 3\]", {"rows": rows[:1]}),
        (r"expected rows of shape \[K\], got \[1, 2\]", {"rows": rows[None]}),
        (r"expected rows of dtype int64, got int32", {"rows": rows.int()}),
        (r"expected gate of shape \[K\], got \[2, 1\]", {"gate": gate[:, None]}),
        (r"expected gate of dtype float32 or float32, got float64", {"gate": gate.double()}),
        (r"expected gate of 2 elements, got \[1\]", {"gate": gate[:1]}),
        (r"expected base_scale of shape \[N\], got \[\]", {"base_scale": scale[0]}),
        (
            r"expected base_scale of dtype float32 or float32, got float16",
            {"base_scale": scale.half()},
        ),
        (r"expected base_scale of 4 elements, got \[3\]", {"base_scale": scale[1:]}),
        (r"expected updates on cpu, got meta", {"updates": updates.to(meta)}),
        (r"expected rows on cpu, got meta", {"rows": rows.to(meta)}),
        (r"expected gate on cpu, got meta", {"gate": gate.to(meta)}),
        (r"expected base_scale on cpu, got meta", {"base_scale": scale.to(meta)}),
        (rf"{name}: expected rows in \[0, 4\), got rows\[0\] = 4", {"rows": rows + 2}),
        (rf"{name}: expected rows in \[0, 4\), got rows\[1\] = -1", {"rows": rows - 1}),
    ):
        args = {"base": base, "updates": updates, "rows": rows, "gate": gate, "base_scale": scale}
        values_or_devices = "meta" in message or "rows in" in message
        check_bad_input(message, op, **{**args, **bad}, fake=not values_or_devices)


def test_bad_input_of_in_place() -> None:
    base, updates, rows = torch.zeros(4, 3), torch.ones(2, 3), torch.tensor([2, 0])
    message = r"scatter_tokens_: expected base whose elements do not share .* strides \[0, 1\]"
    check_bad_input(message, scatter_tokens_, base[:1].expand(4, 3), updates, rows)


def test_an_empty_base_was_refused_for_its_strides() -> None:
    base = torch.zeros(1, 0).expand(2, 0)
    assert base.stride(0) == 0
    none = torch.zeros(0, dtype=torch.int64)
    with FakeTensorMode(allow_non_fake_inputs=True):
        scatter_tokens_(base, base[:0], none)
    assert scatter_tokens_(base, base[:0], none) is base


def test_bad_input_of_backward() -> None:
    op, name = torch.ops.mor.scatter_tokens_backward, "scatter_tokens_backward"
    grad, updates, rows = torch.zeros(4, 3), torch.ones(2, 3), torch.tensor([2, 0])
    gate, scale, need = torch.ones(2), torch.ones(4), (True, True)
    for message, args in (
        (rf"{name}: expected grad of shape \[N, D\]", (grad[0], None, None, rows, None, None)),
        ("expected grad of dtype float32", (grad.int(), None, None, rows, None, None)),
        ("expected rows of dtype int64", (grad, None, None, rows.int(), None, None)),
        (r"expected base of shape \[4, 3\]", (grad, grad[1:], None, rows, None, scale)),
        (r"expected updates of shape \[2, 3\]", (grad, None, grad, rows, gate, None)),
        ("expected updates of dtype float32", (grad, None, updates.half(), rows, gate, None)),
        ("expected gate of 2 elements", (grad, None, updates, rows, scale, None)),
        ("expected base_scale of 4 elements", (grad, grad, None, rows, gate, gate)),
        ("expected gate with updates", (grad, None, updates, rows, None, None)),
        ("expected base_scale with base", (grad, grad, None, rows, gate, None)),
    ):
        check_bad_input(message, op, *args, *need)
    for base in (None, grad):
        check_bad_input(
            rf"{name}: expected rows in \[0, 4\), got rows\[0\] = 4",
            op, grad, base, None, rows + 2, gate, scale, *need, fake=False,
        )  # fmt: skip
