"""Token-choice dispatch and combine: which rows go on, which leave and are added, all recursions.

The depths, gates and the number of rows of each step are given; the block is left out: its input is
returned, and its output is a given tensor, so this is routing alone and nothing can be optimised
away. Ours calls the operators as mor/modules/token_choice.py does without gradients. The authors'
form loops over sequences: nonzero, gather and padding before the block, two more nonzero with
scatter_add and scatter after it; their loops over masks, positions and RoPE are left out. The plain
forms know the packed rows and split them by nonzero or by a stable argsort; adding is index_add,
or, as no row repeats, index_copy; into a copy made once and then in place. A ratio above 1 means
that ours is faster.
"""

from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import torch
from harness import DTYPES, compiled, dtype_name, generator, line, parse_args, report, wanted
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from mor.modules.recursion import add_rows
from mor.ops import gather_tokens, group_rows

# hidden [N, D], output of the block in each step -> hidden with all added, inputs of the block
Form = Callable[[Tensor, list[Tensor]], tuple[Tensor, list[Tensor]]]


class Choice:
    """Depth and gate of every token, and what follows from them."""

    def __init__(self, batch: int, length: int, num_recursions: int, dtype: torch.dtype) -> None:
        """Depths are drawn evenly, as a balanced router chooses."""
        n, self.batch, self.length = batch * length, batch, length
        self.num_recursions = num_recursions
        self.depths = torch.randint(1, num_recursions + 1, (n,), generator=generator())
        self.gates = torch.rand(n, generator=generator()).to(dtype)
        self.positions = torch.arange(length).repeat(batch)
        self.cu_seqlens = torch.arange(batch + 1, dtype=torch.int32) * length
        self.active = [int((self.depths > step).sum()) for step in range(num_recursions)]


def ours(choice: Choice) -> Form:
    def run(hidden: Tensor, outputs: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        out, inputs, rows = hidden, [hidden], torch.arange(len(hidden))
        cu_seqlens, positions = choice.cu_seqlens, choice.positions
        for step, x in enumerate(outputs):
            done, done_x = rows, x
            if step + 1 < choice.num_recursions:
                stays = gather_tokens(choice.depths, rows) > step + 1
                grouped, offsets = group_rows(stays, 2, cu_seqlens)
                cut = [choice.active[step] - choice.active[step + 1], choice.active[step + 1]]
                starts = offsets[choice.batch :]
                cu_seqlens = (starts - starts[0]).to(torch.int32)
                positions = gather_tokens(positions, grouped[cut[0] :])
                done_x, stay_x = gather_tokens(x, grouped).split(cut)
                done, rows = gather_tokens(rows, grouped).split(cut)
                inputs.append(stay_x)
            gate = gather_tokens(choice.gates, done)
            out = add_rows(step, out, done_x, done, gate, keep=False)
        return out, [*inputs, positions, cu_seqlens]

    return run


def authors(choice: Choice) -> Form:
    depths = choice.depths.view(choice.batch, choice.length)
    gates = choice.gates.view(choice.batch, choice.length)

    def rows_of(mask: Tensor, width: int) -> tuple[Tensor, Tensor]:
        rows = torch.where(mask)[0]
        return rows, rows[:, None].expand(-1, width)

    def run(hidden: Tensor, outputs: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        width = hidden.shape[1]
        state = hidden.view(choice.batch, choice.length, width).clone()
        out, inputs = state.clone(), []
        for step, x in enumerate(outputs):
            active = [rows_of(depths[b] > step, width) for b in range(choice.batch)]
            taken = [state[b].gather(0, index) for b, (_, index) in enumerate(active)]
            inputs.append(pad_sequence(taken, batch_first=True))
            for b, (rows, _) in enumerate(active):
                leave, index = rows_of(depths[b, rows] == step + 1, width)
                gated = x[b].gather(0, index) * gates[b, rows[leave], None]
                out[b].scatter_add_(0, rows[leave, None].expand_as(gated), gated)
                if step + 1 < choice.num_recursions:
                    stay, index = rows_of(depths[b, rows] > step + 1, width)
                    kept = x[b].gather(0, index)
                    state[b].scatter_(0, rows[stay, None].expand_as(kept), kept)
        return out.view(-1, width), inputs

    return run


def plain(choice: Choice, split: str, add: str) -> Form:
    def run(hidden: Tensor, outputs: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        out, inputs, rows = hidden.clone(), [hidden], torch.arange(len(hidden))
        positions, counts = choice.positions, None
        for step, x in enumerate(outputs):
            done, done_x = rows, x
            if step + 1 < choice.num_recursions:
                stays = choice.depths[rows] > step + 1
                if split == "nonzero":
                    leave, stay = (~stays).nonzero().flatten(), stays.nonzero().flatten()
                else:
                    leaving = choice.active[step] - choice.active[step + 1]
                    grouped = stays.argsort(stable=True)
                    leave, stay = grouped[:leaving], grouped[leaving:]
                counts = (choice.depths.view(choice.batch, -1) > step + 1).sum(1)
                positions = positions[stay]
                done, done_x = rows[leave], torch.index_select(x, 0, leave)
                inputs.append(torch.index_select(x, 0, stay))
                rows = rows[stay]
            gate = choice.gates[done, None]
            if add == "index_add":
                out.index_add_(0, done, done_x * gate)
            else:  # only right because no row repeats
                taken = torch.index_select(hidden, 0, done)
                out.index_copy_(0, done, torch.addcmul(taken, done_x, gate))
        cu_seqlens = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).to(torch.int32)
        return out, [*inputs, positions, cu_seqlens]

    return run


def measure(shape: tuple[int, int, int], num_recursions: int, dtype: torch.dtype) -> None:
    what = {"shape": str(list(shape)), "N_r": num_recursions, "dtype": dtype_name(dtype)}
    if not wanted(what):
        return
    batch, length, width = shape
    choice = Choice(batch, length, num_recursions, dtype)
    hidden = torch.randn(batch * length, width).to(dtype)
    packed = [torch.randn(rows, width).to(dtype) for rows in choice.active]
    padded = []
    for step, x in enumerate(packed):
        counts = (choice.depths.view(batch, -1) > step).sum(1).tolist()
        padded.append(pad_sequence(x.split(counts), batch_first=True))
    forms = {"ours": ours(choice)}
    for add in ("index_add", "index_copy"):
        for split in ("nonzero", "argsort"):
            forms[f"{split}, {add}"] = plain(choice, split, add)
        forms[f"compiled argsort, {add}"] = compiled(plain(choice, "argsort", add))
    with torch.inference_mode():
        want, inputs = forms["ours"](hidden, packed)
        near = {"rtol": 2e-2, "atol": 2e-2}
        for form in forms.values():
            got, taken = form(hidden, packed)
            torch.testing.assert_close(got, want, **near)
            for a, b in zip(taken, inputs, strict=True):
                assert torch.equal(a, b)
        torch.testing.assert_close(authors(choice)(hidden, padded)[0], want, **near)
        calls: dict[str, Callable[[], Any]] = {
            name: partial(form, hidden, packed) for name, form in forms.items()
        }
        calls["authors"] = partial(authors(choice), hidden, padded)
        line(what, calls, seconds=0.1)


if __name__ == "__main__":
    args = parse_args(__doc__)
    shape = (2, 36, 65) if args.smoke else (16, 2048, 576)
    for what in product((3,) if args.smoke else (3, 4), DTYPES):
        measure(shape, *what)
    report("token_choice")
