"""Keys to group by: few and many, equal, sorted and skewed."""

from typing import Any

import torch
from torch import Tensor

from mor.ops import group_rows
from mor.ops.group_rows import reference
from tests.support.operators import OpCase, packed

DTYPES = (torch.int64, torch.int32, torch.bool)
LENGTHS: dict[str, list[int] | None] = {
    "no-sequences": [],
    "no-rows": [0, 0],
    "single": [1],
    "ragged": [5, 0, 63, 64, 65, 1, 130, 0],
    "chunks": [4096, 5000, 4097, 119],  # together 52 whole chunks of CUDA's kernel
    "threads": [20000, 17000],
    "one-row-each": [1] * 70,
    "unpacked": None,
}
CHECKED = ("no-rows", "ragged", "unpacked")
NUM_KEYS = (1, 2, 3, 8, 9, 300)


def make_keys(kind: str, n: int, num_keys: int, generator: torch.Generator) -> Tensor:
    if kind == "equal":
        return torch.full((n,), num_keys - 1)
    keys = torch.randint(0, num_keys, (n,), generator=generator)
    if kind == "sorted":
        return keys.sort().values
    return keys.clamp(max=keys.min() + 1 if n else 0) if kind == "skewed" else keys


def case(
    lengths: str, num_keys: int, kind: str, dtype: torch.dtype, opcheck: bool = False
) -> OpCase:
    def make(_: torch.dtype, device: str, generator: torch.Generator) -> dict[str, Any]:
        given = LENGTHS[lengths]
        n = 333 if given is None else sum(given)
        return {
            "keys": make_keys(kind, n, num_keys, generator).to(device, dtype),
            "num_keys": num_keys,
            "cu_seqlens": None if given is None else packed(given).to(device),
        }

    return OpCase(
        id=f"{lengths}-{num_keys}-{kind}-{dtype}",
        op=group_rows,
        reference=reference,
        raw=torch.ops.mor.group_rows.default,
        opcheck=lengths in CHECKED and num_keys == (2 if dtype == torch.bool else 3),
        make=make,
        exact=True,
    )


CASES = (
    [case(s, n, "random", torch.int64) for s in LENGTHS for n in NUM_KEYS]
    + [case("ragged", n, k, torch.int32) for k in ("equal", "sorted", "skewed") for n in NUM_KEYS]
    + [case(s, 2, "random", torch.bool) for s in LENGTHS]
)
