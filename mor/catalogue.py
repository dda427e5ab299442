"""The systems that route or merge tokens, as `mor info --systems` and README's table show them."""

from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["SYSTEMS", "System", "as_markdown", "as_text"]


@dataclass(frozen=True)
class System:
    """One published method and where it is.

    Attributes:
        name: of the method.
        papers: arXiv numbers.
        module: its `torch.nn.Module`.
        call: what applies it to a loaded model.
        takes: such models.
        tests, demonstrations, figures: paths in the repository.
    """

    name: str
    papers: Sequence[str]
    module: str
    call: str
    takes: str
    tests: Sequence[str]
    demonstrations: Sequence[str] = ()
    figures: Sequence[str] = ()


SYSTEMS = (
    System(
        "Mixture-of-Depths",
        ["2404.02258"],
        "mor.modules.MixtureOfDepths",
        "mor.apply_mod(model)",
        "the decoders that mor.swap takes",
        ["tests/systems/test_mod.py", "tests/systems/test_published_mod.py"],
        ["examples/sister/mod.py"],
        ["docs/pictures/mod.png"],
    ),
    System(
        "p-MoD",
        ["2412.04449"],
        "mor.systems.PMoD",
        "mor.apply_pmod(model)",
        "LLaVA, LLaVA-NeXT",
        ["tests/systems/test_pmod.py"],
        ["examples/sister/pmod.py"],
        ["docs/pictures/pmod.png"],
    ),
    System(
        "VideoLLM-MoD",
        ["2408.16730"],
        "mor.systems.VideoMoD",
        "mor.apply_video_mod(model)",
        "LLaVA-NeXT-Video, LLaVA-OneVision",
        ["tests/systems/test_video_mod.py"],
        ["examples/sister/video_mod.py"],
        ["docs/pictures/video_mod.png"],
    ),
    System(
        "DynaMoE",
        ["2603.01697"],
        "mor.modules.DynaMoE",
        "mor.apply_dynamoe(model, num_experts=8)",
        "decoders of Llama's kind",
        ["tests/systems/test_dynamoe.py"],
        ["examples/sister/dynamoe.py"],
        ["docs/pictures/dynamoe.png"],
    ),
    System(
        "token merging: ToMe, tomesd, CA-ToMe",
        ["2210.09461", "2303.17604", "2501.00946"],
        "mor.modules.TokenMerging",
        "mor.apply_token_merging(model)",
        "ViT, DeiT, CLIP, SigLIP, timm ViTs, diffusers U-Nets and DiTs",
        ["tests/systems/test_token_merging.py", "tests/systems/test_merged_diffusion.py"],
        ["examples/sister/token_merging.py"],
        ["docs/pictures/token_merging.png"],
    ),
)

_COLUMNS = ("module", "one call", "for", "test", "demonstration", "figure", "paper")


def as_text(systems: Sequence[System] = SYSTEMS) -> str:
    """A paragraph for each system, as `mor info --systems` prints them."""
    width = max(map(len, _COLUMNS))
    paragraphs = []
    for system in systems:
        papers = [f"https://arxiv.org/abs/{paper}" for paper in system.papers]
        values = [system.module], [system.call], [system.takes], *_files(system), papers
        lines = [
            f"  {column:<{width}}  {', '.join(value) or 'none'}"
            for column, value in zip(_COLUMNS, values, strict=True)
        ]
        paragraphs.append("\n".join([system.name, *lines]))
    return "\n\n".join(paragraphs)


def as_markdown(systems: Sequence[System] = SYSTEMS) -> str:
    """README's table."""
    lines = [f"| system | {' | '.join(_COLUMNS)} |", "| --- " * (len(_COLUMNS) + 1) + "|"]
    for system in systems:
        cells = [system.name, f"`{system.module}`", f"`{system.call}`", system.takes]
        for files in _files(system):
            links = [f"[{file.rpartition('/')[2]}]({file})" for file in files]
            cells.append(", ".join(links) or "none")
        papers = [f"[arXiv {paper}](https://arxiv.org/abs/{paper})" for paper in system.papers]
        lines.append(f"| {' | '.join([*cells, ', '.join(papers)])} |")
    return "\n".join(lines)


def _files(system: System) -> tuple[Sequence[str], Sequence[str], Sequence[str]]:
    return system.tests, system.demonstrations, system.figures
