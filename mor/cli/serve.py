"""The command `mor serve`."""

from typing import Annotated

import typer

from mor.cli.shell import ModelFolder, one_sentence

__all__ = ["policy_of", "serve"]


def serve(
    model: ModelFolder,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0: any.")] = 8000,
    name: Annotated[
        str | None, typer.Option(help="Name of the model for clients; default: its folder's.")
    ] = None,
    api_key: Annotated[
        str | None, typer.Option(envvar="MOR_API_KEY", help="Key that clients must send.")
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="auto (as saved), float32, bfloat16 or float16.")
    ] = "auto",
    device: Annotated[str, typer.Option(help="cpu, or cuda.")] = "cpu",
    kv_memory: Annotated[str, typer.Option(help="Memory of keys and values.")] = "2GiB",
    block_size: Annotated[int, typer.Option(min=1, help="Tokens of a block.")] = 16,
    max_rows: Annotated[int, typer.Option(min=1, help="Sequences that run at once.")] = 64,
    chunk: Annotated[
        int | None, typer.Option(min=1, help="Prompt tokens in flight at once.")
    ] = None,
    policy: Annotated[
        str, typer.Option(help="auto, lock-step, or the share of rows that waits for the head.")
    ] = "auto",
    max_requests: Annotated[int, typer.Option(min=1, help="Open prompts; more get 429.")] = 256,
    drain: Annotated[
        float, typer.Option(min=0, help="Seconds that running requests have at the end.")
    ] = 30.0,
    deterministic: Annotated[
        bool, typer.Option(help="No result depends on the requests beside it.")
    ] = False,
) -> None:
    """Serve a model over HTTP as OpenAI's API, with a page of live requests at /."""
    with one_sentence():
        from mor._extras import extra

        with extra("serve"):
            from mor.serving.server import serve as run
        from mor.serving.engine import Engine
        from mor.training.generate import load_model

        def make_engine() -> Engine:
            language_model, tokenizer = load_model(model)
            if dtype != "auto":
                import torch

                if dtype not in ("float32", "bfloat16", "float16"):
                    raise ValueError(
                        f"--dtype: expected auto, float32, bfloat16 or float16, got {dtype}"
                    )
                language_model = language_model.to(getattr(torch, dtype))
            return Engine(
                language_model.to(device).eval(),
                tokenizer,
                kv_memory=kv_memory,
                block_size=block_size,
                max_rows=max_rows,
                chunk=chunk,
                policy=policy_of(policy),
                deterministic=deterministic,
            )

        run(
            make_engine,
            name or model.resolve().name,
            host=host,
            port=port,
            api_key=api_key,
            max_requests=max_requests,
            drain=drain,
        )


def policy_of(text: str) -> str | float:
    """What --policy says, as `Engine` takes it."""
    if text in ("auto", "lock-step"):
        return text
    try:
        return float(text)
    except ValueError:
        raise ValueError(
            f"--policy: expected auto, lock-step or a share in 0..1, got {text}"
        ) from None
