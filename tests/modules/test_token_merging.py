"""TokenMerging against a slow reference, and the properties of a merge."""

import copy
import itertools

import pytest
import torch
from torch import Tensor

from mor.modules import MergedTokens, TokenMerging
from mor.modules.token_merging import MergePlan, match_alternate
from mor.ops import depth_attention
from tests.support.host_reads import host_reads


def slow(x: Tensor, metric: Tensor, size: Tensor, r: int, protected: int) -> list[list[list[int]]]:
    """For each sequence the groups of tokens that become one, in the order of the result."""
    groups = []
    for row in torch.nn.functional.normalize(metric.double(), dim=-1):
        tokens = range(protected, len(row))
        sources = [i for i in tokens if i % 2 == 0]
        destinations = [i for i in tokens if i % 2 == 1]
        best = {i: max(destinations, key=lambda j: row[i] @ row[j]) for i in sources}
        ranked = sorted(sources, key=lambda i: -(row[i] @ row[best[i]]).item())
        merged = set(ranked[:r])
        group = [[i] for i in range(protected)]
        group += [[i] for i in sources if i not in merged]
        group += [[j, *(i for i in sorted(merged) if best[i] == j)] for j in destinations]
        groups.append(group)
    return groups


@pytest.mark.parametrize(
    ("tokens", "r", "protected"),
    [(2, 1, 0), (9, 3, 1), (17, 8, 1), (18, 8, 2), (16, 8, 0), (16, 100, 0), (21, 5, 4), (5, 2, 5)],
)
@pytest.mark.parametrize("sized", [False, True])
def test_the_merge_is_that_of_the_slow_reference(
    tokens: int, r: int, protected: int, sized: bool
) -> None:
    torch.manual_seed(tokens + r)
    x, metric = torch.randn(3, tokens, 5), torch.randn(3, tokens, 4)
    size = torch.randint(1, 5, (3, tokens)).float()
    got = TokenMerging(r, protected)(x, metric, size if sized else None)
    size = size if sized else torch.ones(3, tokens)
    pairs = min(r, (tokens - protected) // 2)
    for b, groups in enumerate(slow(x, metric, size, pairs, protected)):
        assert len(groups) == got.x.shape[1] == tokens - pairs
        for row, group in enumerate(groups):
            weights = size[b, group, None]
            want = (x[b, group] * weights).sum(0) / weights.sum()
            torch.testing.assert_close(got.x[b, row], want)
            assert got.size[b, row] == weights.sum()
            assert (got.sources[b, group] == row).all()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def test_layers_of_merges_keep_every_token_once(device: str) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    torch.manual_seed(0)
    merged = MergedTokens(torch.randn(2, 33, 8, device=device), None, None)
    first = merged.x
    for r in (7, 0, 5, 100, 100):
        merged = TokenMerging(r, protected=1)(merged.x, merged.x, merged.size, merged.sources)
        assert merged.size.sum(1).tolist() == [33, 33]
        assert merged.sources.shape == (2, 33)
        assert torch.equal(merged.x[:, 0], first[:, 0]), "the class token merged"
        assert merged.sources[:, 0].tolist() == [0, 0]
        counts = torch.stack([row.bincount(minlength=merged.x.shape[1]) for row in merged.sources])
        assert torch.equal(counts.float(), merged.size)
    for b, row in itertools.product(range(2), range(merged.x.shape[1])):
        members = first[b, merged.sources[b] == row]
        torch.testing.assert_close(members.mean(0), merged.x[b, row])
        assert torch.equal(merged.unmerge()[b, merged.sources[b] == row].unique(dim=0)[0],
                           merged.x[b, row])  # fmt: skip


def test_unmerging_a_merge_of_equal_tokens_changes_nothing() -> None:
    pairs = torch.randn(2, 4, 6).repeat_interleave(2, dim=1)
    merged = TokenMerging(4)(pairs, pairs)
    assert merged.x.shape == (2, 4, 6)
    assert torch.equal(merged.unmerge(), pairs)
    again = TokenMerging(0)(merged.x, merged.x, merged.size, merged.sources)
    assert all(torch.equal(a, b) for a, b in zip(again, merged, strict=True))


def test_r_0_is_the_identity_bit_for_bit() -> None:
    x = torch.randn(2, 7, 4)
    merged = TokenMerging(0)(x, x)
    assert merged.x is x
    assert torch.equal(merged.unmerge(), x)


def test_attention_by_size_is_attention_over_the_tokens_that_merged() -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 10, 2, 4)
    size = torch.tensor([3.0, 1.0, 4.0, 2.0])
    keys, queries = x[0, :4], x[0, 4:]
    every = keys.repeat_interleave(size.long(), dim=0)

    def attend(k: Tensor, bias: Tensor | None) -> Tensor:
        at = torch.zeros(6, dtype=torch.int64), torch.zeros(len(k), dtype=torch.int64)
        lengths = (torch.tensor([0, len(t)], dtype=torch.int32) for t in (queries, k))
        return depth_attention(queries, k, k, *at, *lengths, key_bias=bias, causal=False)[0]

    torch.testing.assert_close(attend(keys, size.log()), attend(every, None))


def test_gradients() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 9, 3, dtype=torch.float64, requires_grad=True)
    metric, size = torch.randn(2, 9, 4), torch.rand(2, 9) + 1
    merging = TokenMerging(3, protected=1)
    torch.autograd.gradcheck(lambda x: merging(x, metric, size).x, x)
    torch.autograd.gradcheck(lambda x: merging(x, metric, size).unmerge(), x)


def test_compiles_in_one_graph() -> None:
    x, merging = torch.randn(2, 9, 4), TokenMerging(3, protected=1)
    compiled = torch.compile(merging, fullgraph=True, backend="aot_eager")
    for got, want in zip(compiled(x, x), merging(x, x), strict=True):
        torch.testing.assert_close(got, want)


def test_reads_nothing_back_from_the_device() -> None:
    x = torch.randn(2, 9, 4)
    with host_reads() as reads:
        TokenMerging(3, protected=1)(x, x).unmerge()
    assert reads == []


def test_a_sequence_merges_as_it_would_alone() -> None:
    torch.manual_seed(1)
    x = torch.randn(3, 17, 8)
    merging = TokenMerging(6, protected=1)
    together = merging(x, x)
    for b in range(3):
        alone = merging(x[b : b + 1], x[b : b + 1])
        for got, want in zip(together, alone, strict=True):
            assert torch.equal(got[b], want[0])


def test_zeros_and_nan_in_the_metric_merge_last() -> None:
    metric = torch.ones(1, 8, 2)
    metric[0, 0], metric[0, 2] = 0, torch.nan
    plan = match_alternate(metric, 2)
    assert isinstance(plan, MergePlan)
    assert plan.segments[[0, 2]].tolist() == [0, 1]


@pytest.mark.parametrize("options", [{"r": -1}, {"r": 1.5}, {"r": True}, {"r": 1, "protected": -2}])
def test_bad_options_are_named(options: dict[str, object]) -> None:
    name = "protected" if "protected" in options else "r"
    with pytest.raises(ValueError, match=f"TokenMerging: {name}: expected an integer from 0"):
        TokenMerging(**options)


def test_bad_shapes_are_named() -> None:
    with pytest.raises(ValueError, match=r"expected x \[B, N, D\] and metric .* got \[3, 4\]"):
        TokenMerging(1)(torch.randn(3, 4), torch.randn(3, 4))


def test_copies_and_prints() -> None:
    assert str(copy.deepcopy(TokenMerging(3, 1))) == "TokenMerging(r=3, protected=1)"
