"""The command `mor analyze`."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from mor.cli.serve import policy_of
from mor.cli.shell import ModelFolder, given_names, one_sentence

__all__ = ["analyze"]


#: Options that say how a model is served.
_OF_SERVING = ("dtype", "depths", "rows", "rate", "policy", "kv_memory", "device", "timing")


def analyze(
    ctx: typer.Context,
    model: ModelFolder,
    serving: Annotated[
        bool, typer.Option("--serving", help="Predict what mor serve reaches, by simulation.")
    ] = False,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Tokens of a prompt.")] = 256,
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens of an answer.")] = 128,
    dtype: Annotated[
        str, typer.Option(help="auto (as saved), float32, bfloat16 or float16.")
    ] = "auto",
    depths: Annotated[
        str | None,
        typer.Option(
            help="Shares or counts of the tokens by depth, from 0, as 0,50,30,20. Default: what "
            "the configuration plans."
        ),
    ] = None,
    rows: Annotated[
        str, typer.Option(help="Sequences that run at once: a line for each number.")
    ] = "1,8,32,64",
    rate: Annotated[
        float | None,
        typer.Option(help="Requests per second of all replicas; says how many these are."),
    ] = None,
    policy: Annotated[
        str, typer.Option(help="auto, lock-step, or the share of rows that waits for the head.")
    ] = "auto",
    kv_memory: Annotated[
        str | None,
        typer.Option(help="Memory of keys and values. Default: as much as is needed."),
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, or cuda: where passes are timed.")] = "cpu",
    timing: Annotated[
        Path | None,
        typer.Option(help="What --serving --json printed: takes its times, measures none."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show what a model costs and, with --serving, how many requests a server of it answers."""
    with one_sentence():
        given = given_names(ctx)
        if not serving and (idle := [name for name in _OF_SERVING if name in given]):
            flags = ", ".join(f"--{name.replace('_', '-')}" for name in idle)
            raise ValueError(f"{flags}: expected --serving beside it, got none")
        counts = None if depths is None else _numbers("depths", depths, float)
        sizes = _numbers("rows", rows, int)
        if min(sizes) < 1:
            raise ValueError(f"--rows: expected numbers >= 1, got {rows}")
        if rate is not None and not 0 < rate < float("inf"):
            raise ValueError(f"--rate: expected requests per second > 0, got {rate:g}")
        if device not in ("cpu", "cuda"):
            raise ValueError(f"--device: expected cpu or cuda, got {device}")
        by_policy = policy_of(policy)

        from mor.analysis import costs
        from mor.models.swap.saved_model import unchanged_config
        from mor.training.generate import find_model

        folder = find_model(model)
        config = unchanged_config(folder)
        length = prompt_tokens + new_tokens
        found: dict[str, Any] = {
            "model": str(model),
            "parameters": costs.count_parameters(config),
            "sequence_tokens": length,
            "flops_per_token": costs.flops_per_token(config, length),
        }
        if serving:
            from mor.serving import sizing

            times = None if timing is None else sizing.Timing.read(timing)
            if times is not None and "device" in given and device != times.device:
                raise ValueError(
                    f"--device: expected {times.device}, on which {timing} was timed, got {device}"
                )
            engine = sizing.sizing_engine(
                folder, max(sizes), dtype=dtype, device=device, kv_memory=kv_memory, timing=times
            )
            times = times or sizing.Timing.measure(engine)
            shares = (
                sizing.expected_depths(config)
                if counts is None
                else sizing.depth_shares(counts, engine.packed.num_steps)
            )
            load = sizing.Load(prompt_tokens, new_tokens, shares)
            found |= {"load": asdict(load), "kv_memory": kv_memory, "timing": asdict(times)}
            found["servers"] = [
                sizing.size_server(
                    engine, times, load, size, rate=rate, limited=kv_memory is not None,
                    policy=by_policy,
                ).to_dict()
                for size in sizes
            ]  # fmt: skip
    if as_json:
        typer.echo(json.dumps(found, indent=1))
    else:
        _show(found, asked=rate)


def _numbers(name: str, text: str, kind: type) -> list[Any]:
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"--{name}: expected numbers with commas between, got {text}") from None


def _show(found: dict[str, Any], asked: float | None) -> None:
    typer.echo(
        f"{found['parameters'] / 1e6:.1f}M parameters, {found['flops_per_token'] / 1e6:.1f} MFLOP "
        f"per token of a sequence of {found['sequence_tokens']}"
    )
    if "servers" not in found:
        return
    from rich.console import Console
    from rich.table import Table

    load, times = found["load"], found["timing"]
    shares = ", ".join(f"{share:.0%} at {depth}" for depth, share in enumerate(load["depths"]))
    typer.echo(
        f"A server on {_place(times)}, {times['dtype']}: prompts of {load['prompt_tokens']} "
        f"tokens, answers of {load['new_tokens']}, depths {shares}"
    )
    limited, with_rate = found["kv_memory"] is not None, asked is not None
    columns = ["rows", "tokens\n/s", "requests\n/s", "KV\nMiB", *["pre-\nempted"] * limited]
    columns += ["loaded\nto", "first token\np50 p99", "next token\np50 p99"]
    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in [*columns, *["replicas"] * with_rate]:
        table.add_column(column, justify="right", no_wrap=True)
    for server in found["servers"]:
        cells = [
            str(server["rows"]),
            f"{server['tokens_per_second']:.0f}",
            _short(server["requests_per_second"]),
            _short(server["kv_bytes"] / 2**20),
            *[str(server["preemptions"])] * limited,
            _short(server["rate"]),
            _milliseconds(server["first_token"]),
            _milliseconds(server["inter_token"]),
            *[str(server["replicas"])] * with_rate,
        ]
        table.add_row(*cells)
    console = Console()
    console.width = max(console.width, 120)  # what is wider than the terminal goes on below
    console.print(table)
    typer.echo("Limits in tokens and requests; times, at the load in requests/s, in ms.")


def _place(times: dict[str, Any]) -> str:
    if times["device"] != "cpu":
        return str(times["device"])
    return f"{times['threads']} thread{'s' * (times['threads'] > 1)} of a CPU"


def _short(number: float) -> str:
    return f"{number:.3g}" if number < 1000 else f"{number:.0f}"


def _milliseconds(times: Sequence[float]) -> str:
    return " ".join(_short(seconds * 1e3) for seconds in times)
