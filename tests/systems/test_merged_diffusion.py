"""tomesd and CA-ToMe: against PyPI's tomesd, and in diffusers models built small."""

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

import mor
from mor.modules.token_merging import MergePlan, match, match_above, split_cells
from tests.support.host_reads import host_reads

pytestmark = pytest.mark.usefixtures("one_thread")


def theirs() -> Any:
    return pytest.importorskip("tomesd", reason="tomesd is not installed")


def groups(plan: MergePlan, row: int, tokens: int) -> set[frozenset[int]]:
    """The sets of tokens that share a row."""
    segments = plan.segments.view(-1, tokens)[row].tolist()
    return {frozenset(i for i in range(tokens) if segments[i] == s) for s in segments}


@pytest.mark.parametrize(
    ("height", "width", "cell", "ratio"),
    [(8, 8, (2, 2), 0.5), (9, 7, (2, 2), 0.3), (16, 16, (2, 2), 0.9), (8, 12, (4, 3), 0.6)],
)
def test_merges_are_those_of_tomesd(
    height: int, width: int, cell: tuple[int, int], ratio: float
) -> None:
    tomesd = theirs()
    torch.manual_seed(height * width)
    tokens, (sy, sx) = height * width, cell
    metric, x = torch.randn(2, tokens, 12), torch.randn(2, tokens, 5)
    r = int(tokens * ratio)
    merge, unmerge = tomesd.merge.bipartite_soft_matching_random2d(
        metric, width, height, sx, sy, r, generator=torch.Generator().manual_seed(3)
    )
    generator = torch.Generator().manual_seed(3)
    shape = (height // sy, width // sx, 1)
    choice = torch.randint(sy * sx, shape, generator=generator)[..., 0]
    sources, destinations = split_cells(height, width, cell, choice)
    plan = match(metric, min(r, len(sources)), sources, destinations)
    want = unmerge(merge(torch.eye(tokens).expand(2, -1, -1)))
    for row in range(2):
        got = groups(plan, row, tokens)
        assert got == {frozenset(weights.nonzero()[:, 0].tolist()) for weights in want[row]}
    torch.testing.assert_close(plan.unmerge(plan.merge(x)), unmerge(merge(x)), rtol=1e-6, atol=1e-6)


def test_each_image_is_cut_at_the_threshold_alone() -> None:
    """CA-ToMe's code merges as many of every image as of the one that merges most."""
    torch.manual_seed(0)
    same, diverse = torch.ones(1, 64, 6) + 0.01 * torch.randn(1, 64, 6), torch.randn(1, 64, 6)
    split = split_cells(8, 8, (2, 2), torch.zeros(4, 4, dtype=torch.int64))
    both = torch.cat([same, diverse])
    plan = match_above(both, 0.9, *split)
    lengths = plan.cu_seqlens.diff().tolist()
    assert lengths[0] == 16
    assert 48 < lengths[1] < 64
    assert sum(lengths) == plan.num_rows
    for row, image in enumerate((same, diverse)):
        alone = match_above(image, 0.9, *split)
        assert groups(alone, 0, 64) == groups(plan, row, 64)
        torch.testing.assert_close(
            plan.unmerge(plan.merge(both))[row], alone.unmerge(alone.merge(image))[0]
        )


def test_nothing_reaches_a_threshold_of_1() -> None:
    split = split_cells(4, 4, (2, 2), torch.zeros(2, 2, dtype=torch.int64))
    plan = match_above(torch.randn(2, 16, 5), 1.0, *split)
    x = torch.randn(2, 16, 3)
    assert plan.num_rows == 32
    assert torch.equal(plan.unmerge(plan.merge(x)), x)


def diffusers() -> Any:
    return pytest.importorskip("diffusers", reason="diffusers is missing", exc_type=ImportError)


def unet() -> Any:
    torch.manual_seed(0)
    return diffusers().UNet2DConditionModel(
        sample_size=16, block_out_channels=(16, 32), norm_num_groups=4, layers_per_block=1,
        cross_attention_dim=8, attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ).eval()  # fmt: skip


def dit() -> Any:
    torch.manual_seed(0)
    return diffusers().DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, num_layers=2, sample_size=16,
        patch_size=2, num_embeds_ada_norm=10, norm_num_groups=4,
    ).eval()  # fmt: skip


def call(model: Any, step: int = 0, image: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(step + 100 * image)
    x = torch.randn(2, 4, 16, 16, generator=generator)
    timestep = torch.tensor([5, 5])
    with torch.no_grad():
        if type(model).__name__.startswith("DiT"):
            return model(x, timestep, class_labels=torch.tensor([1, 2])).sample
        text = torch.randn(2, 3, 8, generator=generator)
        return model(x, timestep, encoder_hidden_states=text).sample


@pytest.mark.parametrize("build", [unet, dit])
@pytest.mark.parametrize("options", [{"ratio": 0.5}, {"threshold": 0.2}])
def test_comes_on_and_off(build: Any, options: dict[str, Any]) -> None:
    model = build()
    before, names = call(model), list(model.state_dict())
    classes = [type(m) for m in model.modules()]
    merged = call(mor.apply_token_merging(model, **options))
    assert merged.isfinite().all()
    assert not torch.equal(merged, before)
    assert list(model.state_dict()) == names
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    assert torch.equal(call(mor.remove(model)), before)
    assert [type(m) for m in model.modules()] == classes
    for other in copies:
        other.token_merging.step = -1
        assert torch.equal(call(other), merged)
        assert torch.equal(call(mor.remove(other)), before)


@pytest.mark.parametrize("build", [unet, dit])
def test_ratio_0_and_threshold_1_merge_nothing(build: Any) -> None:
    model = build()
    before = call(model)
    assert torch.equal(call(mor.apply_token_merging(model, ratio=0)), before)
    mor.apply_token_merging(mor.remove(model), threshold=1.0)
    torch.testing.assert_close(call(model), before, rtol=1e-4, atol=1e-5)


def test_the_unet_is_that_of_tomesd() -> None:
    """Whose random choice is off: it draws from another generator."""
    tomesd, model = theirs(), unet()
    before = call(model)
    tomesd.apply_patch(model, ratio=0.5, use_rand=False)
    want = call(model)
    assert not torch.allclose(want, before)
    ours = mor.apply_token_merging(unet(), ratio=0.5, seed=None)
    torch.testing.assert_close(call(ours), want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("build", [unet, dit])
def test_compiles_and_reads_nothing_back(build: Any) -> None:
    model = mor.apply_token_merging(build(), ratio=0.5)
    with host_reads() as reads:
        want = call(model)
    assert reads == []
    model.token_merging.step = -1
    compiled = torch.compile(model.forward, fullgraph=True, backend="eager")
    x = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    if build is dit:
        got = compiled(x, torch.tensor([5, 5]), class_labels=torch.tensor([1, 2])).sample
        torch.testing.assert_close(got, want)


class TestPlansAreKept:
    def plans(self, model: Any, steps: int, image: int) -> list[Tensor]:
        """The first block's segments after each step."""
        found = []
        for step in range(steps):
            call(model, step, image)
            found.append(model.token_merging._plans.get(model.token_merging.request, {}).get(0))
        return found

    def test_until_the_next_checkpoint(self) -> None:
        model = mor.apply_token_merging(unet(), threshold=0.2, checkpoints=(0, 2))
        model.token_merging.start("a", num_calls=9)
        plans = self.plans(model, 4, image=0)
        assert plans[0] is plans[1]
        assert plans[1] is not plans[2]
        assert plans[2] is plans[3]

    def test_but_not_into_the_next_image(self) -> None:
        """CA-ToMe's code uses the last plan of the image before until step 8 (its list 3)."""
        model = mor.apply_token_merging(unet(), threshold=0.2, checkpoints=(0, 8))
        model.token_merging.start("a", num_calls=3)
        first = [call(model, step, 0) for step in range(3)]
        assert not model.token_merging._plans, "plans of a finished request were kept"
        with pytest.raises(ValueError, match=r"start\(request, num_calls\) before a request's"):
            call(model)
        model.token_merging.start("a", num_calls=3)
        call(model, 0, 1)
        model.token_merging.start("a", num_calls=3)
        again = [call(model, step, 0) for step in range(3)]
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))

    def test_by_request_where_two_run_in_turn(self) -> None:
        model = mor.apply_token_merging(unet(), threshold=0.2, checkpoints=(0,))
        alone = {}
        for image in (0, 1):
            model.token_merging.start(image, num_calls=2)
            alone[image] = [call(model, step, image) for step in range(2)]
        model.token_merging.start(0, num_calls=2)
        model.token_merging.start(1, num_calls=2)
        for step in range(2):
            for image in (0, 1):
                model.token_merging.resume(image)
                assert torch.equal(call(model, step, image), alone[image][step])


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({}, "expected either ratio or threshold"),
        ({"ratio": 0.5, "threshold": 0.5}, "expected either ratio or threshold"),
        ({"ratio": 1.0}, r"ratio: expected a share in \[0, 1\), got 1.0"),
        ({"threshold": 2}, "threshold: expected a cosine, got 2"),
        ({"ratio": 0.5, "cell": (1, 1)}, "cell: expected two positive numbers"),
        ({"ratio": 0.5, "max_downsample": 0}, "max_downsample: expected a number from 1"),
        ({"ratio": 0.5, "checkpoints": (3,)}, "checkpoints: expected steps, 0 among them"),
        ({"r": 3}, "expected options of a diffusion model .* got r or proportional"),
        ({"ration": 0.5}, "expected options of a diffusion model .* got ration"),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], error: str) -> None:
    model = dit()
    with pytest.raises(ValueError, match=error):
        mor.apply_token_merging(model, **options)
    assert not hasattr(model, "token_merging"), "a refused call left something behind"
