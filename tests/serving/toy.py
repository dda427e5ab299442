"""An engine without a model, and a server: logits are a hash of the tokens so far."""

import json
from collections.abc import Callable, Iterator

import torch

from mor.serving.answers import ChatAnswer, CompletionAnswer, dumps, error_event
from mor.serving.continuation import Continuation
from mor.serving.errors import ApiError, error_body
from mor.serving.grammar import Grammars
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
from mor.serving.requests import ModelLimits, Request, SamplingParams
from mor.serving.sampling import Sampler, token_logprobs
from mor.serving.vocabulary import Vocabulary

from .small_tokenizers import byte_level

VOCABULARY = Vocabulary(byte_level())
EOS = VOCABULARY.tokenizer.eos_token_id
LIMITS = ModelLimits(
    vocab_size=VOCABULARY.size,
    context_length=64,
    num_recursions=3,
    exit_threshold=True,
    eos_token_ids=(EOS,),
)
MODEL = ServedModel(name="toy", vocabulary=VOCABULARY, limits=LIMITS)
SERVER = ServerLimits()


def logits_after(ids: list[int]) -> torch.Tensor:
    """`[1, V]`, mostly of printable characters."""
    generator = torch.Generator().manual_seed(hash(tuple(ids)) % 2**31)
    logits = torch.randn(1, LIMITS.vocab_size, generator=generator)
    logits[:, 97:123] += 4
    return logits


def run(
    prompt: Prompt, params: SamplingParams, grammars: Grammars | None = None
) -> Iterator[Delta]:
    """Deltas of all continuations of a prompt, in turn."""
    request = Request.make(1, prompt.ids, params, LIMITS, arrival=1.0)
    sampler = Sampler(LIMITS.vocab_size)
    running = []
    for index in range(params.n):
        grammar = grammars.matcher(params.grammar) if params.grammar is not None else None
        child = Continuation(request, index, LIMITS, VOCABULARY, grammar)
        child.schedule(1.5)
        if params.prompt_logprobs is not None and len(prompt.ids) > 1:
            rows = [logits_after(list(prompt.ids[:end])) for end in range(1, len(prompt.ids))]
            counts = [params.prompt_logprobs] * len(rows)
            child.add_prompt_logprobs(
                tuple(token_logprobs(torch.cat(rows), prompt.ids[1:], counts))
            )
        running.append(child)
    now = 2.0
    if request.max_tokens == 0:
        for child in running:
            yield child.end("length", now)
        return
    while running:
        logits = torch.cat([logits_after([*prompt.ids, *child.token_ids]) for child in running])
        sampled = sampler(logits, [child.sampling for child in running])
        for child, token in zip(running, sampled, strict=True):
            yield child.advance(token, depth=1 + token.token_id % 3, now=now)
        running = [child for child in running if child.finish_reason is None]
        now += 1


def outputs(prompt: Prompt, params: SamplingParams, grammars=None) -> list[Output]:
    deltas = list(run(prompt, params, grammars))
    return [
        Output.join([delta for delta in deltas if delta.index == index])
        for index in range(params.n)
    ]


def answer(path: str, data: bytes, model: ServedModel = MODEL) -> tuple[int, str, bytes]:
    """Status, media type and body of one HTTP request."""
    try:
        return 200, *_answer(path, data, model)
    except Exception as error:
        found = ApiError.of(error)
        return found.status, "application/json", dumps(error_body(found))


def _answer(path: str, data: bytes, model: ServedModel) -> tuple[str, bytes]:
    media = "application/json"
    plain: dict[str, Callable[[], dict]] = {
        "/v1/models": model.models,
        "/tokenizer_info": model.tokenizer_info,
        "/tokenize": lambda: model.tokenize(parse_body(TokenizeBody, data, SERVER)),
        "/detokenize": lambda: model.detokenize(parse_body(DetokenizeBody, data, SERVER)),
    }
    if path in plain:
        return media, dumps(plain[path]())
    if path == "/v1/chat/completions":
        body = parse_body(ChatCompletionBody, data, SERVER)
        model.check_name(body.model)
        params, prompts = to_params(body), [model.chat(body.messages)]
        reply = ChatAnswer(model, 7, body=body, prompt=prompts[0])
    else:
        body = parse_body(CompletionBody, data, SERVER)
        model.check_name(body.model)
        params, prompts = to_params(body), model.prompts(body, SERVER)
        reply = CompletionAnswer(model, 7, body=body, prompts=prompts)
    if not body.stream:
        found = [outputs(prompt, params) for prompt in prompts]
        whole = reply.whole(found[0]) if isinstance(reply, ChatAnswer) else reply.whole(found)
        return media, dumps(whole)
    events, last = [], []
    for place, prompt in enumerate(prompts):
        for delta in run(prompt, params):
            try:
                chunk = (
                    reply.chunk(delta)
                    if isinstance(reply, ChatAnswer)
                    else reply.chunk(place, delta)
                )
            except ApiError as error:
                return "text/event-stream", b"".join([*events, error_event(error)])
            events += chunk
            if delta.finish_reason is not None:
                last.append(delta)
    return "text/event-stream", b"".join(events + reply.end(last))


def post(path: str, served: ServedModel = MODEL, /, **body: object) -> tuple[int, dict]:
    status, _, data = answer(path, json.dumps(body).encode(), served)
    return status, json.loads(data)
