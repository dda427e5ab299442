"""lm-evaluation-harness on local tasks, against log-likelihoods computed by hand."""

import json
import math

import pytest
import torch
import yaml

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


@pytest.fixture(scope="module")
def task_manager(tmp_path_factory):
    from lm_eval.tasks import TaskManager

    folder = tmp_path_factory.mktemp("tasks")
    rows = {"choose": QUESTIONS, "perplexity": [{"text": text} for text in TEXTS]}
    kinds = {
        "choose": {
            "output_type": "multiple_choice",
            "doc_to_text": "{{question}}",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": "{{answer}}",
            "metric_list": [{"metric": "acc"}],
        },
        "perplexity": {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{text}}",
            "metric_list": [{"metric": "byte_perplexity"}],
        },
    }
    for name, kind in kinds.items():
        data = folder / f"{name}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows[name]))
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
