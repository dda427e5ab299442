import pytest
import torch
from torch import Tensor

from mor.ops import kv_append
from mor.ops.kv_append import reference
from tests.cases.kv_append import CASES, make_inputs, on_copies
from tests.support.operators import DTYPES, OpCase, check_bad_input, check_op

NAMES = ("k_cache", "v_cache", "k", "v", "slot_mapping")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op_case", CASES, ids=lambda c: c.id)
def test_kv_append(op_case: OpCase, dtype: torch.dtype) -> None:
    check_op(op_case, dtype)


def test_the_last_of_equal_slots_stays() -> None:
    cache = torch.zeros(1, 2, 1, 1), torch.zeros(1, 2, 1, 1)
    rows = torch.arange(1.0, 6.0).view(5, 1, 1)
    kv_append(*cache, rows, -rows, torch.tensor([1, 0, 1, -7, 1]))
    assert cache[0].flatten().tolist() == [2, 5]
    assert cache[1].flatten().tolist() == [-2, -5]


@pytest.mark.parametrize("layout", ["layers", "fused", "fused_in_block", "heads_first"])
def test_slices_of_a_pool(layout: str) -> None:
    """Only the slots named are written, in whatever way a pool is cut."""
    inputs = make_inputs((6, 5, 3, 8), 11)
    pool = {
        "layers": torch.zeros(2, 6, 4, 5, 3, 8)[:, :, 1],
        "fused": torch.zeros(6, 2, 5, 3, 8).transpose(0, 1),
        "fused_in_block": torch.zeros(6, 5, 2, 3, 8).movedim(2, 0),
        "heads_first": torch.zeros(2, 6, 3, 5, 8).transpose(2, 3),
    }[layout]
    pool.copy_(torch.stack([inputs["k_cache"], inputs["v_cache"]]))
    rows = {name: inputs[name] for name in NAMES[2:]}
    kv_append(pool[0], pool[1], **rows)
    reference(**inputs)
    assert torch.equal(pool[0], inputs["k_cache"])
    assert torch.equal(pool[1], inputs["v_cache"])


def test_rows_of_a_fused_projection() -> None:
    inputs = make_inputs((6, 5, 3, 8), 11)
    want = on_copies(reference)(**inputs)
    fused = torch.cat([inputs["k"], inputs["v"]], dim=1)
    got = on_copies(kv_append)(**{**inputs, "k": fused[:, :3], "v": fused[:, 3:]})
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], want[1])
    turned = {**inputs, "k": inputs["k"].mT.contiguous().mT}
    assert torch.equal(on_copies(kv_append)(**turned)[0], want[0])


@pytest.mark.parametrize("operand", ["k_cache", "v_cache", "k", "v"])
@pytest.mark.parametrize("width", [6, 9])
def test_an_operand_in_the_middle_of_other_memory(operand: str, width: int) -> None:
    """Its address (width 6) or its strides (9) allow no access of more than one element."""
    inputs = make_inputs((6, 5, 3, 6), 11, "repeated", torch.bfloat16)
    want = on_copies(reference)(**inputs)
    t = inputs[operand]
    strides = [s // 6 * width for s in t.stride()[:-1]]
    memory = torch.zeros(t.numel() // 6 * width + 1, dtype=t.dtype)
    inputs[operand] = memory.as_strided(t.shape, (*strides, 1), int(width == 6)).copy_(t)
    kv_append(**inputs)
    assert torch.equal(inputs["k_cache"], want[0])
    assert torch.equal(inputs["v_cache"], want[1])


def test_nothing_is_written_before_an_error() -> None:
    inputs = make_inputs((2, 4, 2, 8), 3)
    before = inputs["k_cache"].clone(), inputs["v_cache"].clone()
    inputs["slot_mapping"] = torch.tensor([0, 3, 8])
    check_bad_input(
        r"kv_append: expected slot_mapping below 8 .* got slot_mapping\[2\] = 8",
        kv_append, fake=False, **inputs,
    )  # fmt: skip
    assert torch.equal(inputs["k_cache"], before[0])
    assert torch.equal(inputs["v_cache"], before[1])


def test_a_gradient_is_refused() -> None:
    inputs = make_inputs((2, 4, 2, 8), 3)
    inputs["k"].requires_grad_()
    check_bad_input(
        "kv_append: expected operands that need no gradient, got k", kv_append, **inputs
    )
    with torch.no_grad():
        kv_append(**inputs)


@pytest.mark.unsanitized
def test_compiles() -> None:
    inputs = make_inputs((6, 5, 3, 8), 11)

    def step(k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, slots: Tensor) -> Tensor:
        kv_append(k_cache, v_cache, k * 2, v, slots)
        return k_cache.sum()

    eager, compiled = ([t.clone() for t in inputs.values()] for _ in range(2))
    torch.testing.assert_close(torch.compile(step, fullgraph=True)(*compiled), step(*eager))
    assert all(torch.equal(a, b) for a, b in zip(eager, compiled, strict=True))


CACHE, ROWS, SLOTS = torch.zeros(3, 4, 2, 8), torch.zeros(5, 2, 8), torch.arange(5)
BAD: dict[str, dict[str, Tensor]] = {
    r"k_cache of shape \[num_blocks, block_size, Hkv, head_dim\], got": {"k_cache": CACHE[0]},
    "v_cache of shape": {"v_cache": CACHE[0]},
    "k_cache of dtype float32, bfloat16, float16 or float64, got int64": {"k_cache": CACHE.long()},
    "v_cache of dtype float32, got float64": {"v_cache": CACHE.double()},
    r"v_cache of the shape of k_cache \[3, 4, 2, 8\], got \[2, 4, 2, 8\]": {"v_cache": CACHE[:2]},
    "a block_size of at least 1, got": {"k_cache": CACHE[:, :0], "v_cache": CACHE[:, :0]},
    "k_cache with a contiguous head_dim": {"k_cache": torch.zeros(3, 4, 8, 2).mT},
    "v_cache with a contiguous head_dim": {"v_cache": torch.zeros(3, 4, 2, 16)[..., ::2]},
    "k_cache whose elements do not share memory": {"k_cache": CACHE[:1].expand(3, 4, 2, 8)},
    "v_cache whose elements do not share memory": {"v_cache": CACHE[:, :, :1].expand(3, 4, 2, 8)},
    r"slot_mapping of shape \[N\]": {"slot_mapping": SLOTS[None]},
    "slot_mapping of dtype int64, got int32": {"slot_mapping": SLOTS.int()},
    r"k of shape \[N, Hkv, head_dim\]": {"k": ROWS[0]},
    r"v of shape \[N, Hkv, head_dim\]": {"v": ROWS[0]},
    "k of dtype float32, got float16": {"k": ROWS.half()},
    "v of dtype float32, got float16": {"v": ROWS.half()},
    r"k of shape \[5, 2, 8\], got \[4, 2, 8\]": {"k": ROWS[:4]},
    r"v of shape \[5, 2, 8\], got \[5, 1, 8\]": {"v": ROWS[:, :1]},
    r"k of shape \[5, 2, 8\], got \[5, 2, 7\]": {"k": ROWS[..., :7]},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input(message: str) -> None:
    good = dict(zip(NAMES, (CACHE, CACHE.clone(), ROWS, ROWS, SLOTS), strict=True))
    kv_append(**good)
    check_bad_input(f"kv_append: expected {message}", kv_append, **{**good, **BAD[message]})


@pytest.mark.parametrize("name", NAMES[1:])
def test_bad_device(name: str) -> None:
    good = dict(zip(NAMES, (CACHE, CACHE.clone(), ROWS, ROWS, SLOTS), strict=True))
    bad = {**good, name: good[name].to("meta")}
    check_bad_input(f"expected {name} on cpu, got meta", kv_append, fake=False, **bad)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op_case", CASES, ids=lambda c: c.id)
def test_kv_append_on_cuda(op_case: OpCase, dtype: torch.dtype) -> None:
    check_op(op_case, dtype, "cuda")
