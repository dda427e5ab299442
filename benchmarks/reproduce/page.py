"""docs/results.md and its figures from the JSON files: `python -m benchmarks.reproduce.page`."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from benchmarks.reproduce.design import LOSS, Claim, Experiment
from benchmarks.reproduce.experiments import EXPERIMENTS
from benchmarks.reproduce.figures import draw
from benchmarks.reproduce.intervals import VERDICTS, interval, verdict
from benchmarks.reproduce.records import Run, interval_of, names_of, read_runs, value_of

__all__ = ["FIGURES", "PAGE", "RESULTS", "page"]

ROOT = Path(__file__).parents[2]
#: The JSON files of the runs that the page shows.
RESULTS = ROOT / "benchmarks" / "results" / "reproduce"
PAGE = ROOT / "docs" / "results.md"
#: Folder of its figures, from the page.
FIGURES = "pictures/results/"

_INTRO = """# Results

The experiments of the paper (arXiv 2507.10524), run again with this package.
`python -m benchmarks.reproduce.page` writes this page from the JSON files in
`benchmarks/results/reproduce/`.

## How to read this page

**What is compared.** An experiment trains several models that differ in one thing, its variants.
The data, the order of the data, the batch, the optimiser and the seed of the weights are the same.

**What is held equal.** Either the training tokens or the training FLOPs, as the table below says.
FLOPs are those of `mor.analysis.flops_per_token` for every model: matrix products and attention
over visible pairs, with the language-model head and the routers. At equal FLOPs the learning rate
warms up, stays and decays (WSD), at equal tokens it follows a cosine, as in the paper; so one model
has two losses in two experiments, and only those of one experiment may be compared.

**What a loss is.** The mean over held-out text, in nats per token. Routing is causal unless a
column says top-k. A number with ± is the mean over the seeds with its 95% confidence interval by
Student's t.

**How to read a verdict.** Each claim says that one number is lower than another. The column
*difference* is the first number less the second one, taken seed by seed, so a negative difference
agrees with the claim. The verdict comes from its interval only:

| verdict | meaning |
| --- | --- |
| reproduced | the interval lies below zero |
| contradicted | the interval lies above zero |
| not at this size | the interval contains zero: these runs cannot tell |
| too few seeds | fewer than three seeds, so nothing is claimed |

FLOPs and bytes are computed, so their intervals have no width and their verdicts are arithmetic.
At 95%, about one claim in twenty gets a verdict by chance where there is no difference.

**What preset `tiny` can tell.** Its models, of width 64, train for 128 steps, so that all
experiments fit two cores. Each section says what loss a model has that knows only how often each
token occurs; these models are not far below it. So their losses say which model learns faster at
the start, and a verdict at this preset need not hold for a long training. It tests directions, and
none of the paper's numbers.

## How to reproduce it

Each experiment is one command in a clone of the repository. It goes on where it was if it was
killed, and experiments with one `--output` share the models they have in common.
[Training](training.md#the-papers-experiments) has the options and the presets of the paper's sizes.
An experiment of this table without a section below has not been run here.
"""


def page(runs: Mapping[tuple[str, str], Sequence[Run]], figures: str = "") -> str:
    """The whole page as Markdown.

    Args:
        runs: by experiment and preset.
        figures: the folder of the figures, from the page.
    """
    commands = [
        [experiment.title, experiment.equal, f"`{_command(name, 'tiny', (0, 1, 2))}`"]
        for name, experiment in EXPERIMENTS.items()
    ]
    parts = [_INTRO, *_table(["experiment", "held equal", "command"], commands, "---"), ""]
    shown = [
        (experiment, preset)
        for experiment in EXPERIMENTS.values()
        for name, preset in sorted(runs)
        if name == experiment.name
    ]
    if shown:
        counts = []
        for experiment, preset in shown:
            found = Counter(row[-1] for row in _judged(experiment, runs[experiment.name, preset]))
            counts.append([experiment.title, preset, *(str(found[word]) for word in VERDICTS)])
        parts += ["## Verdicts", "", "The number of claims by verdict.", ""]
        parts += [*_table(["experiment", "preset", *VERDICTS], counts), ""]
    last = None
    for experiment, preset in shown:
        if experiment is not last:
            parts += [f"## {experiment.title}", "", experiment.about, ""]
        last = experiment
        parts += _section(experiment, runs[experiment.name, preset], figures)
    return "\n".join(parts)


def _command(experiment: str, preset: str, seeds: Iterable[int]) -> str:
    name, _, budget = preset.partition("-x")
    more = f" --budget {budget}" if budget else ""
    numbers = " ".join(map(str, seeds))
    return f"python -m benchmarks.reproduce {experiment} --preset {name}{more} --seed {numbers}"


def _section(experiment: Experiment, runs: Sequence[Run], figures: str) -> list[str]:
    settings, first = runs[0]["settings"], runs[0]["results"]
    seeds = [run["settings"]["seed"] for run in runs]
    machine, name = runs[0]["machine"], f"{experiment.name}-{settings['name']}"
    measured = list(dict.fromkeys(key for result in first for key in result["measured"]))
    head = ["variant", "parameters", "training tokens", "training FLOPs", "loss"]
    rows = [
        [
            result["name"],
            f"{result['parameters'] / 1e6:.2f} M",
            f"{result['train_tokens'] / 1e3:.0f} k",
            f"{result['train_flops']:.3g}",
            str(interval_of(runs, result["name"], LOSS)),
            *(
                str(interval_of(runs, result["name"], key)) if key in result["measured"] else ""
                for key in measured
            ),
        ]
        for result in first
    ]
    lines = [
        f"### Preset `{settings['name']}`, seeds {', '.join(map(str, seeds))}",
        "",
        f"`{_command(experiment.name, settings['name'], seeds)}`, "
        f"{machine.get('gpu', machine['cpu'])}, threads: {machine['threads']}, torch "
        f"{machine['torch']}; `{name}-seed*.json`. A model that knows only how often each token "
        f"occurs has a loss of {settings['unigram_loss']:.4f}.",
        "",
        f"![{experiment.title}, preset {settings['name']}]({figures}{name}.svg)",
        "",
        *_table([*head, *measured], rows),
        "",
    ]
    if judged := _judged(experiment, runs):
        lines += [*_table(["claim", "difference", "verdict"], judged), ""]
    return lines


def _judged(experiment: Experiment, runs: Sequence[Run]) -> list[list[str]]:
    """Rows of the claims whose numbers all runs have: a preset may lack a size or a class."""
    known = set.intersection(
        *(
            {(result["name"], key) for result in run["results"] for key in names_of(result)}
            for run in runs
        )
    )
    claims = [claim for claim in experiment.claims if {claim.lower, claim.higher} <= known]
    return [[claim.text, *_difference(claim, runs)] for claim in claims]


def _difference(claim: Claim, runs: Sequence[Run]) -> tuple[str, str]:
    differences = [
        claim.difference(value_of(run, *claim.lower), value_of(run, *claim.higher)) for run in runs
    ]
    if claim.relative:
        return f"{interval([100 * one for one in differences])} %", verdict(differences)
    return str(interval(differences)), verdict(differences)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], rule: str = "---:") -> list[str]:
    rules = ["---", *[rule] * (len(head) - 1)]
    return ["| " + " | ".join(cells) + " |" for cells in (head, rules, *rows)]


if __name__ == "__main__":
    runs = read_runs(RESULTS)
    PAGE.write_text(page(runs, FIGURES))
    for (experiment, preset), of_seeds in runs.items():
        draw(of_seeds, PAGE.parent / FIGURES / f"{experiment}-{preset}.svg")
