"""lm-evaluation-harness on local tasks: against log-likelihoods by hand, and through our server."""

import json
import math
import random
import threading
import time
from collections.abc import Iterator

import pytest
import torch
import yaml
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from tests.serving.small_server import model as small_model
from tests.serving.small_tokenizers import byte_level

from .conftest import TEXTS, tiny_model

pytest.importorskip("lm_eval")

QUESTIONS = [
    {
        "question": "the quick brown",
        "choices": ["fox jumps", "dog sleeps over", "lazy"],
        "answer": 0,
    },
    {"question": "a lazy fox", "choices": ["and", "sleeps over the dog", "jumps"], "answer": 1},
    {"question": "the dog", "choices": ["the", "over", "sleeps"], "answer": 2},
]


def questions(count: int) -> list[dict]:
    """Some that no model answers well, each with four different choices: no ties."""
    draw = random.Random(0)
    words = sorted({word for text in TEXTS for word in text.split()})

    def text(most: int) -> str:
        return " ".join(draw.choices(words, k=draw.randint(1, most)))

    found = []
    for _ in range(count):
        choices: dict[str, None] = {}
        while len(choices) < 4:
            choices[text(3)] = None
        found.append({"question": text(12), "choices": [*choices], "answer": draw.randrange(4)})
    return found


CHOOSE = {
    "output_type": "multiple_choice",
    "doc_to_text": "{{question}}",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "{{answer}}",
    "metric_list": [{"metric": "acc"}],
}
TASKS = {
    "choose": (QUESTIONS, CHOOSE),
    "choose_of_many": (questions(200), CHOOSE),
    "perplexity": (
        [{"text": text} for text in TEXTS],
        {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{text}}",
            "metric_list": [{"metric": "byte_perplexity"}],
        },
    ),
    "continue": (
        questions(200),
        {
            "output_type": "generate_until",
            "doc_to_text": "{{question}}",
            "doc_to_target": "{{choices[0]}}",
            "generation_kwargs": {"until": ["e", "\n\n"], "max_gen_toks": 12, "temperature": 0},
            "metric_list": [{"metric": "exact_match"}],
        },
    ),
}


@pytest.fixture(scope="module")
def task_manager(tmp_path_factory):
    from lm_eval.tasks import TaskManager

    folder = tmp_path_factory.mktemp("tasks")
    for name, (rows, kind) in TASKS.items():
        data = folder / f"{name}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        task = {
            "task": f"local_{name}",
            "dataset_path": "json",
            "dataset_kwargs": {
                "data_files": {"test": str(data)},
                "cache_dir": str(folder / "cache"),
            },
            "test_split": "test",
            **kind,
        }
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(task))
    return TaskManager(include_path=str(folder), include_defaults=False)


def log_likelihood(model, context: list[int], continuation: list[int]) -> float:
    tokens = torch.tensor([context + continuation])
    with torch.no_grad():
        scores = model(tokens[:, :-1], use_cache=False).logits[0].log_softmax(-1)
    chosen = scores.gather(1, tokens[0, 1:, None])[len(context) - 1 :]
    return chosen.sum().item()


def test_multiple_choice_and_perplexity(routing, tokenizer, task_manager, monkeypatch):
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    model = tiny_model(**routing).eval()
    results = lm_eval.simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4),
        tasks=["local_choose", "local_perplexity"],
        task_manager=task_manager,
        bootstrap_iters=0,
        log_samples=True,
    )

    samples = {s["doc_id"]: s for s in results["samples"]["local_choose"]}
    right = 0
    for number, row in enumerate(QUESTIONS):
        context = tokenizer.encode(row["question"])
        scores = []
        for choice in row["choices"]:
            whole = tokenizer.encode(row["question"] + " " + choice)
            scores.append(log_likelihood(model, context, whole[len(context) :]))
        got = [float(answer[0]) for answer in samples[number]["filtered_resps"]]
        assert got == pytest.approx(scores, abs=1e-4)
        right += scores.index(max(scores)) == row["answer"]
    assert results["results"]["local_choose"]["acc,none"] == pytest.approx(right / len(QUESTIONS))

    total = sum(
        log_likelihood(model, [tokenizer.bos_token_id], tokenizer.encode(text)) for text in TEXTS
    )
    size = sum(len(text.encode()) for text in TEXTS)
    want = math.exp(-total / size)
    got = results["results"]["local_perplexity"]["byte_perplexity,none"]
    assert got == pytest.approx(want, rel=1e-5)


def _norm(self: LlamaRMSNorm, x: torch.Tensor) -> torch.Tensor:
    return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, True) + self.variance_epsilon))


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[str, object]]:
    """Address of a server in a thread, and its model: in float64, in which nothing is a tie.

    So are its norms, which Transformers computes in float32 whatever the model's dtype.
    """
    uvicorn = pytest.importorskip("uvicorn")
    pytest.importorskip("tenacity", reason="needs lm_eval's API: pip install tenacity")
    from mor.serving import Engine
    from mor.serving.server import create_app

    model = small_model().double()
    model.generation_config.eos_token_id = byte_level().eos_token_id  # generate() knows none, else
    engine = Engine(model, byte_level(), kv_memory="8MiB", policy=0.5, block_size=8)
    config = uvicorn.Config(create_app(engine, "small"), port=0, log_level="warning")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    host, port = server.servers[0].sockets[0].getsockname()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LlamaRMSNorm, "forward", _norm)
        yield f"http://{host}:{port}", model
    server.should_exit = True
    thread.join()
    engine.check()


@pytest.mark.slow
@pytest.mark.parametrize("tokenizer_backend", ["remote", "huggingface"])
def test_through_http_it_gives_the_scores_of_the_process(
    served, task_manager, tokenizer_backend, tmp_path, monkeypatch
):
    """lm_eval's local-completions against `mor serve`; with "remote" our server tokenizes, too."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    url, model = served
    byte_level().save_pretrained(tmp_path)
    options = {"tokenizer": str(tmp_path)} if tokenizer_backend == "huggingface" else {}
    options |= {"base_url": f"{url}/v1/completions", "model": "small", "num_concurrent": 8}
    options |= {"tokenizer_backend": tokenizer_backend, "max_length": 512, "max_retries": 1}

    def scores(model, **options) -> tuple[dict, dict]:
        found = lm_eval.simple_evaluate(
            model=model, tasks=["local_choose_of_many", "local_perplexity", "local_continue"],
            task_manager=task_manager, bootstrap_iters=0, log_samples=True, **options,
        )  # fmt: skip
        answers = {
            (task, sample["doc_id"]): sample["filtered_resps"]
            for task, samples in found["samples"].items()
            for sample in samples
        }
        return found["results"], answers

    # Its cache takes "a b" + " c" for "a" + " b c".
    local = HFLM(pretrained=model, tokenizer=byte_level(), batch_size=4, logits_cache=False)
    here, there = (
        scores(local),
        scores("local-completions", model_args=options),
    )
    for task, metrics in here[0].items():
        for name in ("acc,none", "exact_match,none"):
            assert there[0][task].get(name) == metrics.get(name)
    assert here[1].keys() == there[1].keys()
    assert len(here[1]) == 200 + 200 + len(TEXTS)
    for key, answers in here[1].items():
        if key[0] == "local_continue":
            assert there[1][key] == answers, key
        else:
            for ours, theirs in zip(there[1][key], answers, strict=True):
                assert ours == pytest.approx(theirs, abs=1e-9), key
