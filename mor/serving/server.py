"""The HTTP server: OpenAI's API over an engine, with depths, deadlines and a live page."""

import asyncio
import contextlib
import hmac
import json
import signal
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from mor.serving.answers import ChatAnswer, CompletionAnswer, dumps, error_event
from mor.serving.engine import Engine
from mor.serving.errors import ApiError, error_body
from mor.serving.loop import EngineLoop, EngineStopped
from mor.serving.metrics import Metrics
from mor.serving.outputs import Delta, Output
from mor.serving.prompts import Prompt, ServedModel
from mor.serving.protocol import (
    ChatCompletionBody,
    CompletionBody,
    DetokenizeBody,
    ServerLimits,
    TokenizeBody,
    parse_body,
    to_params,
)
from mor.serving.requests import RequestError

__all__ = ["create_app", "serve"]

#: Events that a page may be behind; a slower one loses some.
_LIVE_EVENTS = 1000


def create_app(
    engine: Engine,
    name: str = "mor",
    *,
    api_key: str | None = None,
    limits: ServerLimits | None = None,
    max_requests: int = 256,
) -> FastAPI:
    """An ASGI application that serves an engine.

    Args:
        engine: with a tokenizer; it belongs to the application from now on.
        name: of the model, as clients ask for it.
        api_key: what clients send as a bearer token; None asks for none.
        limits: of one request.
        max_requests: prompts that are open at once; more are answered 429.

    Raises:
        ValueError: an engine without a tokenizer.
    """
    if engine.vocabulary is None:
        raise ValueError("create_app: expected an engine with a tokenizer, got one without")
    limits = limits or ServerLimits()
    model = ServedModel(
        name=name, vocabulary=engine.vocabulary, limits=engine.limits, created=int(time.time())
    )
    metrics, live = Metrics(engine), _Live()

    def observe(deltas: list[Delta], seconds: float) -> None:
        metrics.observe(deltas, engine.clock())
        live.publish(deltas)

    loop = EngineLoop(engine, observe)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        loop.start()
        yield
        await asyncio.to_thread(loop.close)

    app = FastAPI(title="mor", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.loop = loop
    _add_errors(app)

    def authorize(request: Request) -> None:
        if api_key is None:
            return
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        given = given or request.query_params.get("key", "")  # a page's events have no headers
        if not hmac.compare_digest(given.encode(), api_key.encode()):
            raise ApiError(401, "expected the server's key as a bearer token", code="invalid_key")

    def admit(count: int) -> None:
        loop.check_open()
        if loop.open_requests + count > max_requests:
            message = f"expected at most {max_requests} open prompts; try again later"
            raise ApiError(429, message, code="too_many_requests", retry_after=1)

    def streams(
        prompts: Sequence[Prompt], body: CompletionBody | ChatCompletionBody
    ) -> list[AsyncIterator[Delta]]:
        admit(len(prompts))
        params = to_params(body)
        deadline = None
        if body.deadline_s is not None:
            deadline = engine.clock() + body.deadline_s
        options: dict[str, Any] = {"priority": body.priority, "deadline": deadline}
        return [loop.stream(prompt.ids, params, **options) for prompt in prompts]

    async def answer(
        request: Request, prompts: Sequence[Prompt], body: Any, made: Any, chunk: Any
    ) -> Response:
        news = _merged(streams(prompts, body))
        first = await anext(news)  # what is wrong with the request is found before any answer
        if body.stream:
            return StreamingResponse(
                _events(first, news, made, chunk, len(prompts) * body.n),
                media_type="text/event-stream",
                headers={"Cache-Control": "no-cache"},
            )
        collected = _collect(first, news, len(prompts))
        return _json(made.whole(await _unless_disconnected(request, collected)))

    @app.post("/v1/completions", openapi_extra=_body_of(CompletionBody))
    async def completions(request: Request) -> Response:
        authorize(request)
        body = parse_body(CompletionBody, await _read(request, limits), limits)
        model.check_name(body.model)
        prompts = model.prompts(body, limits)
        made = CompletionAnswer(model, int(time.time()), body=body, prompts=prompts)
        return await answer(request, prompts, body, made, made.chunk)

    @app.post("/v1/chat/completions", openapi_extra=_body_of(ChatCompletionBody))
    async def chat_completions(request: Request) -> Response:
        authorize(request)
        body = parse_body(ChatCompletionBody, await _read(request, limits), limits)
        model.check_name(body.model)
        prompt = model.chat(body.messages)
        made = ChatAnswer(model, int(time.time()), body=body, prompt=prompt)
        whole = _OnePrompt(made)
        return await answer(request, [prompt], body, whole, whole.chunk)

    @app.post("/tokenize", openapi_extra=_body_of(TokenizeBody))
    async def tokenize(request: Request) -> Response:
        authorize(request)
        body = parse_body(TokenizeBody, await _read(request, limits), limits)
        model.check_name(body.model)
        return _json(model.tokenize(body))

    @app.post("/detokenize", openapi_extra=_body_of(DetokenizeBody))
    async def detokenize(request: Request) -> Response:
        authorize(request)
        body = parse_body(DetokenizeBody, await _read(request, limits), limits)
        model.check_name(body.model)
        return _json(model.detokenize(body))

    @app.get("/tokenizer_info")
    async def tokenizer_info(request: Request) -> Response:
        authorize(request)
        return _json(model.tokenizer_info())

    @app.get("/v1/models")
    async def models(request: Request) -> Response:
        authorize(request)
        return _json(model.models())

    @app.get("/v1/models/{wanted:path}")
    async def one_model(request: Request, wanted: str) -> Response:
        authorize(request)
        model.check_name(wanted)
        return _json(model.model())

    @app.get("/health")
    async def health() -> Response:
        loop.check_open()
        return _json({"status": "ok"})

    @app.get("/metrics")
    async def prometheus() -> Response:
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/", include_in_schema=False)
    async def page() -> HTMLResponse:
        return HTMLResponse((Path(__file__).parent / "page.html").read_text(encoding="utf-8"))

    @app.get("/live", include_in_schema=False)
    async def live_events(request: Request) -> Response:
        authorize(request)
        return StreamingResponse(live.events(engine), media_type="text/event-stream")

    return app


def serve(
    make_engine: Callable[[], Engine],
    name: str,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    drain: float = 30.0,
    log_level: str = "warning",
    **options: Any,
) -> None:
    """Serve until a signal ends it.

    SIGTERM or SIGINT refuses new requests and lets running ones finish; a second one ends at once.

    Args:
        make_engine: loads the model. The port is bound before, so that nobody loads it in vain.
        name: of the model.
        host: to listen on; by default this machine alone.
        port: to listen on.
        drain: seconds that running requests have to finish.
        log_level: of uvicorn.
        **options: of `create_app`.

    Raises:
        SystemExit: the port is taken, or the engine failed.
    """
    config = uvicorn.Config(FastAPI(), host=host, port=port, log_level=log_level)
    socket = config.bind_socket()
    app = create_app(make_engine(), name, **options)
    config = uvicorn.Config(
        app, host=host, port=port, log_level=log_level, timeout_graceful_shutdown=5
    )
    loop: EngineLoop = app.state.loop
    server = _DrainingServer(config, loop, drain)
    print(f"{name} at http://{host}:{socket.getsockname()[1]}", flush=True)
    server.run(sockets=[socket])
    if loop.error is not None:
        raise SystemExit(f"mor serve: the engine failed: {loop.error}")


class _DrainingServer(uvicorn.Server):
    """Tells uvicorn to exit, which ends streams, only when none is left or time is up."""

    def __init__(self, config: uvicorn.Config, loop: EngineLoop, drain: float) -> None:
        super().__init__(config)
        self._engine_loop, self._drain = loop, drain

    async def startup(self, sockets: Any = None) -> None:
        await super().startup(sockets)
        self._watcher = asyncio.create_task(self._watch())

    def handle_exit(self, sig: int, frame: Any) -> None:
        if self._engine_loop.draining or not self._engine_loop.alive:
            super().handle_exit(signal.SIGINT, frame)  # again: at once
            self.force_exit = self._engine_loop.alive
        self._engine_loop.draining = True

    async def _watch(self) -> None:
        """Exits after the drain, or when the engine has died."""
        end = None
        while not self.should_exit:
            loop = self._engine_loop
            if end is None and loop.draining:
                end = time.monotonic() + self._drain
            drained = end is not None and (loop.open_requests == 0 or time.monotonic() > end)
            if drained or not loop.alive:
                await asyncio.sleep(0.1)  # last bytes of answers
                self.should_exit = True
            await asyncio.sleep(0.02)


class _OnePrompt:
    """A chat's answer in the form of one with several prompts."""

    def __init__(self, answer: ChatAnswer) -> None:
        self.answer = answer

    def whole(self, outputs: Sequence[Sequence[Output]]) -> dict[str, Any]:
        return self.answer.whole(outputs[0])

    def chunk(self, place: int, delta: Delta) -> list[bytes]:
        return self.answer.chunk(delta)

    def end(self, last: Sequence[Delta]) -> list[bytes]:
        return self.answer.end(last)


async def _merged(
    streams: Sequence[AsyncIterator[Delta]],
) -> AsyncIterator[tuple[int, Delta]]:
    """Deltas of several streams as they come, with the stream's place. One error ends all."""
    news: asyncio.Queue[tuple[int, Delta | BaseException | None]] = asyncio.Queue()

    async def read(place: int, stream: AsyncIterator[Delta]) -> None:
        try:
            async for delta in stream:
                news.put_nowait((place, delta))
            news.put_nowait((place, None))
        except Exception as error:
            news.put_nowait((place, error))

    tasks = [asyncio.create_task(read(place, stream)) for place, stream in enumerate(streams)]
    try:
        left = len(tasks)
        while left:
            place, item = await news.get()
            if isinstance(item, BaseException):
                raise item
            if item is None:
                left -= 1
            else:
                yield place, item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _collect(
    first: tuple[int, Delta], news: AsyncIterator[tuple[int, Delta]], count: int
) -> list[list[Output]]:
    found: list[dict[int, list[Delta]]] = [{} for _ in range(count)]
    place, delta = first
    found[place][delta.index] = [delta]
    async with contextlib.aclosing(news) as rest:  # type: ignore[type-var]
        async for place, delta in rest:
            found[place].setdefault(delta.index, []).append(delta)
    return [[Output.join(parts[index]) for index in sorted(parts)] for parts in found]


async def _events(
    first: tuple[int, Delta],
    news: AsyncIterator[tuple[int, Delta]],
    made: Any,
    chunk: Callable[[int, Delta], list[bytes]],
    choices: int,
) -> AsyncIterator[bytes]:
    last: dict[tuple[int, int], Delta] = {}

    def note(item: tuple[int, Delta]) -> bytes:
        place, delta = item
        if delta.finish_reason is not None:
            last[place, delta.index] = delta
        return b"".join(chunk(place, delta))

    try:
        async with contextlib.aclosing(news) as rest:  # type: ignore[type-var]
            yield note(first)
            async for item in rest:
                yield note(item)
        yield b"".join(made.end([last[key] for key in sorted(last)]))
    except Exception as error:
        yield error_event(_api_error(error))


async def _unless_disconnected(
    request: Request, work: Coroutine[Any, Any, list[list[Output]]]
) -> list[list[Output]]:
    """The result, unless the client leaves: then the work is cancelled and its requests abort."""
    task = asyncio.create_task(work)

    async def left() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    watcher = asyncio.create_task(left())
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ApiError(499, "the client closed the connection")
        return task.result()
    finally:
        for one in (task, watcher):
            one.cancel()
        await asyncio.gather(task, watcher, return_exceptions=True)


async def _read(request: Request, limits: ServerLimits) -> bytes:
    """The body, of which no more is kept than may be there."""
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > limits.body_bytes:
            message = f"body: expected at most {limits.body_bytes} bytes, got more"
            raise ApiError(413, message, code="body_too_large")
        parts.append(part)
    return b"".join(parts)


def _json(body: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(dumps(body), status, headers, media_type="application/json")


def _api_error(error: Exception) -> ApiError:
    if isinstance(error, EngineStopped):
        return ApiError(503, str(error), code="unavailable", retry_after=1)
    return ApiError.of(error)


def _add_errors(app: FastAPI) -> None:
    def answered(error: Exception) -> Response:
        found = _api_error(error)
        headers = {} if found.retry_after is None else {"Retry-After": str(found.retry_after)}
        return _json(error_body(found), found.status, headers)

    async def known(request: Request, error: Exception) -> Response:
        return answered(error)

    async def of_http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        found = ApiError(error.status_code, str(error.detail))
        return _json(error_body(found), found.status, dict(error.headers or {}))

    for kind in (ApiError, RequestError, EngineStopped, Exception):
        app.add_exception_handler(kind, known)
    app.add_exception_handler(HTTPException, of_http)


def _body_of(kind: Any) -> dict[str, Any]:
    """OpenAPI's description of a body that `parse_body` reads."""
    schema = kind.model_json_schema()
    known = schema.pop("$defs", {})

    def inlined(node: Any, depth: int = 0) -> Any:
        if isinstance(node, list):
            return [inlined(item, depth) for item in node]
        if not isinstance(node, dict):
            return node
        if "$ref" in node:
            target = node["$ref"].rsplit("/", 1)[-1]
            return inlined(known[target], depth + 1) if target in known and depth < 8 else {}
        return {key: inlined(value, depth) for key, value in node.items()}

    content = {"application/json": {"schema": inlined(schema)}}
    errors = {
        str(status): {"description": text}
        for status, text in (
            (400, "A request that can never work."),
            (401, "A wrong key."),
            (404, "Another model."),
            (413, "A body that is too long."),
            (429, "Too many open requests."),
            (503, "The engine takes no requests."),
        )
    }
    return {"requestBody": {"content": content, "required": True}, "responses": errors}


class _Live:
    """Events of the page at `/`: each delta of each request, for whoever looks."""

    def __init__(self) -> None:
        self._readers: dict[asyncio.Queue[bytes], asyncio.AbstractEventLoop] = {}

    def publish(self, deltas: Sequence[Delta]) -> None:
        """Called in the engine's thread."""
        if not self._readers or not deltas:
            return
        data = json.dumps(
            [
                {
                    "request": delta.request_id,
                    "index": delta.index,
                    "text": delta.text,
                    "depths": list(delta.depths),
                    "end": delta.finish_reason,
                }
                for delta in deltas
            ]
        )
        message = f"data: {data}\n\n".encode("ascii")
        for queue, loop in list(self._readers.items()):
            with contextlib.suppress(RuntimeError):  # its loop is closed
                loop.call_soon_threadsafe(_put, queue, message)

    async def events(self, engine: Engine) -> AsyncIterator[bytes]:
        queue: asyncio.Queue[bytes] = asyncio.Queue(_LIVE_EVENTS)
        self._readers[queue] = asyncio.get_running_loop()
        try:
            start = json.dumps({"recursions": engine.limits.num_recursions})
            yield f"event: start\ndata: {start}\n\n".encode()
            while True:
                yield await queue.get()
        finally:
            del self._readers[queue]


def _put(queue: asyncio.Queue[bytes], message: bytes) -> None:
    if not queue.full():
        queue.put_nowait(message)
