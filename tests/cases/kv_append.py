"""Tokens to write into a paged cache: slots named once, skipped, repeated."""

from typing import Any

import torch
from torch import Tensor

from mor.ops import kv_append
from mor.ops.kv_append import reference
from tests.support.operators import OpCase


def make_inputs(
    shape: tuple[int, int, int, int],
    num_tokens: int,
    slots: str = "once",
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    generator: torch.Generator | None = None,
) -> dict[str, Any]:
    """`shape` of the caches; slots "once" (each at most once, some skipped), "repeated" or "pairs".

    Of "pairs", tokens 2 i and 2 i + 1 have slot i.
    """
    generator = generator or torch.Generator().manual_seed(0)
    num_slots = shape[0] * shape[1]
    if slots == "once":
        slot_mapping = torch.randperm(num_slots, generator=generator)[:num_tokens]
        slot_mapping[1::4] = -1
    elif slots == "pairs":
        slot_mapping = torch.arange(num_tokens) // 2
    else:
        slot_mapping = torch.randint(-2, num_slots, (num_tokens,), generator=generator)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64).to(device, dtype)

    rows = (num_tokens, *shape[2:])
    return {
        "k_cache": normal(*shape),
        "v_cache": normal(*shape),
        "k": normal(*rows),
        "v": normal(*rows),
        "slot_mapping": slot_mapping.to(device),
    }


def on_copies(function: Any) -> Any:
    """`function` on copies of the caches, of their strides: returns these."""

    def run(k_cache: Tensor, v_cache: Tensor, **rest: Tensor) -> tuple[Tensor, Tensor]:
        copies = []
        for cache in (k_cache, v_cache):
            pool = cache._base if cache._base is not None else cache
            copies.append(
                pool.clone().as_strided(cache.shape, cache.stride(), cache.storage_offset())
            )
        assert function(*copies, **rest) is None
        return copies[0], copies[1]

    return run


def case(shape: tuple[int, int, int, int], num_tokens: int, slots: str = "once") -> OpCase:
    return OpCase(
        id="{}x{}x{}x{}".format(*shape) + f"-N{num_tokens}-{slots}",
        op=on_copies(kv_append),
        reference=on_copies(reference),
        raw=torch.ops.mor.kv_append.default,
        opcheck=shape in [(3, 4, 2, 8), (7, 5, 2, 17), (2, 3, 2, 5)],
        make=lambda *args: make_inputs(shape, num_tokens, slots, *args),
        exact=True,
    )


CASES = [
    case((0, 4, 2, 8), 0),
    case((3, 4, 2, 8), 0),
    case((3, 4, 0, 8), 5),
    case((3, 4, 2, 0), 5),
    case((1, 1, 1, 1), 1),
    case((5, 1, 3, 7), 4),
    case((7, 5, 2, 17), 30),
    case((9, 16, 3, 64), 33),
    case((2, 3, 2, 5), 40, "repeated"),
    case((6, 5, 3, 8), 30, "pairs"),
    case((4, 16, 3, 64), 2000, "repeated"),
    case((40, 16, 8, 128), 600),
]
