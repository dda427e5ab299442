"""One thread runs an engine for many callers: asyncio streams, aborts, a drained end."""

import asyncio
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable
from concurrent.futures import Future
from functools import partial
from typing import Any

from mor.serving.engine import Engine
from mor.serving.outputs import Delta
from mor.serving.requests import SamplingParams

__all__ = ["EngineLoop", "EngineStopped"]


class EngineStopped(RuntimeError):
    """The engine takes no requests: it is draining, was closed, or failed."""


class EngineLoop:
    """Steps an engine in a thread of its own while there is work.

    Nobody else may use the engine meanwhile. Streams may come from any number of event loops; each
    loop is woken once for a pass, whatever the number of its streams.

    Args:
        engine: the engine.
        observe: called in the engine's thread after each pass with its deltas and its seconds.

    Attributes:
        error: what ended the thread; None while it is well.
        draining: no new requests are taken.

    Example:
        >>> async def text(loop: EngineLoop, prompt: list[int]) -> list[int]:
        ...     return [t async for delta in loop.stream(prompt) for t in delta.token_ids]
    """

    def __init__(
        self, engine: Engine, observe: Callable[[list[Delta], float], None] | None = None
    ) -> None:
        self.engine, self._observe = engine, observe
        self.error: BaseException | None = None
        self.draining = False
        self._wake = threading.Condition()
        self._mail: deque[Callable[[], None]] = deque()
        self._streams: dict[int, _Stream] = {}
        self._starting: set[Future[int]] = set()  # not yet taken by the thread
        self._stopping = self._ended = False
        self._thread = threading.Thread(target=self._run, name="mor-engine", daemon=True)

    def start(self) -> "EngineLoop":
        """Start the thread; again is no error."""
        if not self._thread.is_alive() and self.error is None and not self._stopping:
            self._thread.start()
        return self

    @property
    def alive(self) -> bool:
        """Whether requests are computed."""
        return self._thread.is_alive() and self.error is None

    @property
    def open_requests(self) -> int:
        """Requests that have not ended."""
        return len(self._streams)

    def close(self, drain: float = 0.0) -> None:
        """End the thread.

        Args:
            drain: seconds that running requests have to finish; what is left is aborted.
        """
        self.draining = True
        end = time.monotonic() + drain
        while self._streams and self.alive and time.monotonic() < end:
            time.sleep(0.01)

        def stop() -> None:
            self._stopping = True
            for id in list(self._streams):
                self.engine.abort(id)

        self._post(stop)
        if self._thread.is_alive():
            self._thread.join()

    async def stream(
        self,
        prompt: str | Iterable[int],
        params: SamplingParams | None = None,
        *,
        priority: int = 0,
        deadline: float | None = None,
        tenant: int = 0,
    ) -> AsyncIterator[Delta]:
        """Run a request; see `Engine.add`. Leaving the iteration early aborts it.

        Yields:
            What is new in each of its continuations. A reader slower than the engine finds the
            deltas of a continuation joined into one.

        Raises:
            RequestError: a request that can never be served.
            EngineStopped: the engine takes no requests, or failed on the way.
        """
        stream = _Stream(asyncio.get_running_loop(), (params or SamplingParams()).n)
        started: Future[int] = Future()

        def add() -> None:
            self._starting.discard(started)
            if not started.set_running_or_notify_cancel():
                return
            try:
                id = self.engine.add(
                    prompt, params, priority=priority, deadline=deadline, tenant=tenant
                )
            except Exception as error:
                started.set_exception(error)
            else:
                self._streams[id] = stream
                started.set_result(id)

        self.check_open()
        self.start()
        self._starting.add(started)
        self._post(add)
        if self._ended:  # between the check and the letter
            self._fail_waiting()
        try:
            id = await asyncio.wrap_future(started)
        except asyncio.CancelledError:
            # It may have been added just now.
            self._post(lambda: self._abort_added(started))
            raise
        try:
            async for delta in stream:
                yield delta
        finally:
            if not stream.ended:
                self._post(lambda: self._abort(id))

    def check_open(self) -> None:
        """Raise EngineStopped unless requests are taken."""
        if self.error is not None:
            raise EngineStopped(f"the engine failed: {self.error}") from self.error
        if self.draining:
            raise EngineStopped("the engine takes no new requests: it is shutting down")

    def _post(self, message: Callable[[], None]) -> None:
        with self._wake:
            self._mail.append(message)
            self._wake.notify()

    def _abort(self, id: int) -> None:
        self._streams.pop(id, None)
        self.engine.abort(id)

    def _abort_added(self, started: "Future[int]") -> None:
        if started.done() and not started.cancelled() and started.exception() is None:
            self._abort(started.result())

    def _run(self) -> None:
        try:
            while not (self._stopping and not self.engine.has_work):
                with self._wake:
                    while not self._mail and not self.engine.has_work:
                        self._wake.wait()
                    mail, self._mail = self._mail, deque()
                for message in mail:
                    message()
                begin = time.perf_counter()
                deltas = self.engine.step()
                if self._observe is not None:
                    self._observe(deltas, time.perf_counter() - begin)
                self._hand_over(deltas)
        except BaseException as error:
            self.error = error
        finally:
            self._ended = True
            self._fail_waiting()

    def _hand_over(self, deltas: list[Delta]) -> None:
        loops: dict[asyncio.AbstractEventLoop, list[tuple[_Stream, Delta]]] = {}
        for delta in deltas:
            stream = self._streams.get(delta.request_id)
            if stream is None:  # its reader left
                continue
            loops.setdefault(stream.loop, []).append((stream, delta))
            if delta.finish_reason is not None:
                stream.unfinished -= 1
                if stream.unfinished == 0:
                    del self._streams[delta.request_id]
        for loop, news in loops.items():
            _call(loop, partial(_put_all, news))

    def _fail_waiting(self) -> None:
        """Nobody waits for a thread that has ended."""
        self.draining = True
        reason = f"the engine failed: {self.error}" if self.error else "the engine was closed"
        streams, self._streams = list(self._streams.values()), {}
        for stream in streams:
            _call(stream.loop, partial(stream.fail, EngineStopped(reason)))
        for started in list(self._starting):  # requests that came too late
            if started.set_running_or_notify_cancel():
                started.set_exception(EngineStopped(reason))


def _call(loop: asyncio.AbstractEventLoop, function: Callable[[], Any]) -> None:
    try:
        loop.call_soon_threadsafe(function)
    except RuntimeError:  # the reader's loop is closed, and the reader with it
        pass


def _put_all(news: "list[tuple[_Stream, Delta]]") -> None:
    for stream, delta in news:
        stream.put(delta)


class _Stream:
    """Deltas not read yet. All but `unfinished` belongs to the reader's event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop, count: int) -> None:
        self.loop = loop
        self.unfinished = self._missing = count
        self._news: dict[int, Delta] = {}
        self._error: BaseException | None = None
        self._event = asyncio.Event()

    @property
    def ended(self) -> bool:
        return self._missing == 0 or self._error is not None

    def put(self, delta: Delta) -> None:
        earlier = self._news.get(delta.index)
        self._news[delta.index] = delta if earlier is None else earlier.merge(delta)
        self._event.set()

    def fail(self, error: BaseException) -> None:
        self._error = error
        self._event.set()

    async def __aiter__(self) -> AsyncIterator[Delta]:
        while self._missing:
            await self._event.wait()
            self._event.clear()
            news, self._news = list(self._news.values()), {}
            for delta in news:
                self._missing -= delta.finish_reason is not None
                yield delta
            if self._error is not None and self._missing:
                raise self._error
