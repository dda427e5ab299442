"""Sources of text, the tokenizer, the token files and the blocks cut from them.

Over 300 lines in one file: the stages of one pipeline, each fed by the one before.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow
import pytest
import torch
from pyarrow import parquet
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mor.data import (
    TokenBlocks,
    load_tokenizer,
    prepare_tokens,
    train_tokenizer,
    vocabulary_size,
)
from mor.data import tokens as data_module
from mor.data.corpus import Corpus, Document, clean_text, open_corpus, split_documents


def _texts(corpus: Corpus) -> list[str]:
    return [text for _, text in corpus.documents()]


def _corpus(texts: list[str], identity: str = "x") -> Corpus:
    return Corpus("a test", identity, lambda: iter(Document(text, text) for text in texts))


@pytest.fixture(scope="module")
def books() -> list[str]:
    """Two hundred short documents of words."""
    return [
        " ".join(f"word{number * 7 % 90} and" for number in range(n, n + 30)) for n in range(200)
    ]


@pytest.fixture(scope="module")
def tokenizer(books):
    return train_tokenizer(_corpus(books), vocab_size=300)


# Sources


def test_standard_library_is_the_default_and_always_the_same():
    first, second = open_corpus(), open_corpus()
    keys = [key for key, _ in first.documents()]
    assert keys == sorted(keys)
    assert keys == [key for key, _ in second.documents()]
    assert first.identity == second.identity
    assert {"ast.py", "json/decoder.py", "pydoc_data/topics.py"} <= set(keys)
    assert not any(
        part in ("test", "site-packages", "encodings") for key in keys for part in key.split("/")
    )


def test_standard_library_has_enough_text_and_a_held_out_part():
    sizes = {True: 0, False: 0}
    for text, held_out in split_documents(open_corpus()):
        sizes[held_out] += len(text)
    assert sum(sizes.values()) > 5_000_000
    assert 0.02 < sizes[True] / sum(sizes.values()) < 0.1


def _write_jsonl(path: Path, records: list[dict]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def _write_parquet(path: Path, columns: dict[str, list]) -> Path:
    parquet.write_table(pyarrow.table(columns), path)
    return path


def test_each_kind_of_file_gives_its_texts(tmp_path):
    texts = ["one\ntwo", "drei ä"]
    records = [{"text": text, "other": 1} for text in texts]
    (tmp_path / "a.txt").write_text(texts[0])
    (tmp_path / "a.json").write_text(json.dumps(records))
    assert _texts(open_corpus(tmp_path / "a.txt")) == texts[:1]
    assert _texts(open_corpus(tmp_path / "a.json")) == texts
    assert _texts(open_corpus(_write_jsonl(tmp_path / "a.jsonl", records))) == texts
    assert _texts(open_corpus(_write_parquet(tmp_path / "a.parquet", {"text": texts}))) == texts


@pytest.mark.parametrize(
    "encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-be"]
)
def test_byte_order_marks_say_how_to_read_and_are_no_text(tmp_path, encoding):
    texts = ["grün\ntwo", "drei ä"]
    mark = "" if encoding in ("utf-8-sig", "utf-16", "utf-32") else "\ufeff"
    lines = "".join(json.dumps({"text": t}, ensure_ascii=False) + "\r\n" for t in texts)
    for name, content, expected in (
        ("a.txt", texts[0], texts[:1]),
        ("a.jsonl", lines, texts),
        ("a.json", json.dumps([{"text": t} for t in texts], ensure_ascii=False), texts),
    ):
        (tmp_path / name).write_bytes((mark + content).encode(encoding))
        assert _texts(open_corpus(tmp_path / name)) == expected


def test_halves_of_surrogate_pairs_are_replaced(tmp_path):
    """They are valid in JSON, and no tokenizer takes them."""
    whole = "cut \U0001f600 here"
    for count in (5, 50):  # the end is held out, or documents by a hash of their text
        path = tmp_path / f"{count}.jsonl"
        lines = [
            json.dumps({"text": f"{number} and more words {whole}"}) for number in range(count)
        ]
        path.write_text("\n".join(lines).replace("\\ude00", ""))
        corpus = open_corpus(path)
        tokenizer = train_tokenizer(corpus, vocab_size=260)
        files = prepare_tokens(corpus, tokenizer, tmp_path)
        text = tokenizer.decode(np.fromfile(files.train, dtype=files.dtype))
        assert "cut \ufffd here" in text
        assert len(list(split_documents(corpus))) == count
    assert clean_text(whole) == whole


def test_a_file_whose_name_is_not_utf8_is_read(tmp_path):
    for number in range(50):
        (tmp_path / f"{number}.txt").write_text("text")
    os.rename(tmp_path / "0.txt", os.fsencode(tmp_path) + b"/\xff.txt")
    assert len(list(split_documents(open_corpus(tmp_path)))) == 50


def test_records_without_text_are_left_out_and_counted(tokenizer, tmp_path):
    path = _write_jsonl(tmp_path / "a.jsonl", [{"text": None}, {"text": "some"}, {"text": ""}])
    assert (
        prepare_tokens(open_corpus(path), tokenizer, tmp_path)
        .describe()
        .endswith("of 1 document; 2 without text left out")
    )
    path = _write_parquet(tmp_path / "a.parquet", {"text": ["one", None]})
    assert _texts(open_corpus(path)) == ["one", ""]


def test_files_of_a_directory_that_are_not_read_are_counted(tmp_path):
    for name in ("a.txt", "b.csv", "c.csv", "README", ".hidden.csv"):
        (tmp_path / name).write_text("x")
    corpus = open_corpus(tmp_path)
    assert (corpus.files, dict(corpus.skipped)) == (1, {".csv": 2, "": 1})
    assert corpus.describe() == f"{tmp_path}, 1 file, 3 not read (2 .csv, 1 without ending)"


def test_text_field_can_be_named(tmp_path):
    path = _write_jsonl(tmp_path / "a.jsonl", [{"content": "hello"}])
    assert _texts(open_corpus(path, text_field="content")) == ["hello"]
    path = _write_parquet(tmp_path / "a.parquet", {"content": ["hello"], "text": [1]})
    assert _texts(open_corpus(path, text_field="content")) == ["hello"]


def test_directory_is_read_in_order_without_hidden_and_other_files(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / ".git").mkdir()
    for name in ("b.txt", "sub/a.md", ".hidden.txt", ".git/x.txt", "picture.png"):
        (tmp_path / name).write_text(name)
    assert _texts(open_corpus(tmp_path)) == ["b.txt", "sub/a.md"]


def test_identity_changes_with_the_files(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one")
    before = open_corpus(tmp_path).identity
    assert open_corpus(tmp_path).identity == before
    path.write_text("longer")
    assert open_corpus(tmp_path).identity != before


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"\xff\xfe", r"cannot read .*a\.txt: not UTF-8 text \(byte 0\)"),
        ("a.txt", b"one\ntwo \xe4", r"cannot read .*a\.txt: .* \(byte 8\) in line 2; .* iconv"),
        ("a.txt", b"\xff\xfea\0b", r"cannot read .*a\.txt: not UTF-16 text; .* iconv"),
        (
            "a.jsonl",
            b'{"text": "a"}\n\n{"text"',
            r"cannot read .*a\.jsonl: not JSON in line 3 \(.*: column 8\)",
        ),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}', r"a\.jsonl: not UTF-8 .* in line 2"),
        ("a.jsonl", b'{"text": "a", "id": ' + b"1" * 5000 + b"}", r"a\.jsonl: not .* in line 1"),
        ("a.jsonl", b"[" * 100_000, r"a\.jsonl: not JSON .* in line 1"),
        ("a.json", b'[\n{"text" 3}]', r"a\.json: not JSON \(.*: line 2, column 9\)"),
        (
            "a.jsonl",
            b'{"body": "a"}\n',
            r"no text field 'text' in .*a\.jsonl, line 1; its fields are body",
        ),
        ("a.jsonl", b'["a"]\n', "expected an object with a text field 'text' in .* got list"),
        ("a.json", b'{"text": 3}', "expected text in field 'text' of .*record 1, got int"),
        ("a.parquet", b"PAR1 not really", r"cannot read .*a\.parquet"),
        ("a.png", b"", r"cannot read .*a\.png: expected a file ending in \.txt"),
    ],
)
def test_unreadable_file_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        _texts(open_corpus(tmp_path / name))


def test_parquet_without_the_text_field_lists_its_fields(tmp_path):
    path = _write_parquet(tmp_path / "a.parquet", {"body": ["a"], "id": [1]})
    with pytest.raises(
        ValueError, match=r"no text field 'text' in .*a\.parquet; its fields are body, id"
    ):
        _texts(open_corpus(path))


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every file")
def test_file_without_permission_is_named(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("secret")
    path.chmod(0)
    with pytest.raises(ValueError, match=r"cannot read .*a\.txt: Permission denied"):
        _texts(open_corpus(path))


def test_missing_path_and_empty_directory(tmp_path):
    with pytest.raises(ValueError, match=r"no such file or directory: .*nothing\.txt"):
        open_corpus(str(tmp_path / "nothing.txt"))
    with pytest.raises(ValueError, match="no text in"):
        open_corpus(tmp_path)


def test_unreachable_dataset_is_a_clear_error():
    code = "from mor.corpus import open_corpus; open_corpus('somebody/some-dataset')"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert "ValueError: 'somebody/some-dataset' is no local path, and opening it" in result.stderr


def test_dataset_is_streamed_with_its_field_and_split(monkeypatch):
    import datasets

    asked = {}

    def load_dataset(name, config, **options):
        asked.update(name=name, config=config, **options)
        return datasets.Dataset.from_dict({"body": ["a", "b"]}).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    corpus = open_corpus("owner/name", text_field="body", config="small", split="test")
    assert _texts(corpus) == ["a", "b"] == _texts(corpus)
    assert asked == {"name": "owner/name", "config": "small", "split": "test", "streaming": True}
    with pytest.raises(
        ValueError, match="no text field 'text' in dataset owner/name; its fields are body"
    ):
        _texts(open_corpus("owner/name"))


def test_split_depends_on_each_document_alone(books):
    held = {text for text, held_out in split_documents(_corpus(books)) if held_out}
    held_reversed = {text for text, held_out in split_documents(_corpus(books[::-1])) if held_out}
    assert held == held_reversed
    assert 0 < len(held) < 30
    assert not any(held_out for _, held_out in split_documents(_corpus(books[:39])))


# Tokenizer


def test_tokenizer_round_trips_any_text_and_its_folder(tokenizer, tmp_path):
    text = "def f(x):\n\treturn 'ä 🎉\u0000'  # <|endoftext|>\n"
    ids = tokenizer(text, split_special_tokens=True)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert tokenizer.eos_token_id not in ids
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert len(loaded) == len(tokenizer) == 300
    assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert loaded.eos_token_id == tokenizer.eos_token_id == 0


def test_tokenizer_training_is_deterministic(books, tokenizer):
    again = train_tokenizer(_corpus(books), vocab_size=300)
    assert again.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()


def test_tokenizer_errors(books, tmp_path):
    with pytest.raises(ValueError, match="vocab_size must be at least 257"):
        train_tokenizer(_corpus(books), vocab_size=256)
    with pytest.raises(ValueError, match="empty corpus: a test holds no text"):
        train_tokenizer(_corpus(["", ""]))
    with pytest.raises(ValueError, match="cannot load a tokenizer from"):
        load_tokenizer(tmp_path)


# Token files


def test_token_files_hold_every_document_once(books, tokenizer, tmp_path):
    files = prepare_tokens(_corpus(books), tokenizer, tmp_path)
    texts = []
    for path in (files.train, files.validation):
        tokens = np.fromfile(path, dtype=files.dtype)
        assert tokens[-1] == files.end_of_text
        documents = np.split(tokens, np.flatnonzero(tokens == files.end_of_text) + 1)[:-1]
        texts += [tokenizer.decode(document[:-1]) for document in documents]
    assert sorted(texts) == sorted(books)
    assert files.validation.stat().st_size > 0


def test_end_is_held_out_of_one_long_text(tokenizer, tmp_path, monkeypatch):
    # Small pieces: cutting a long text must neither lose nor add anything.
    monkeypatch.setattr(data_module, "_PIECE", 100)
    text = "\n".join(f"line {number}" for number in range(500)) + "x" * 300
    files = prepare_tokens(_corpus([text]), tokenizer, tmp_path)
    train, validation = (
        np.fromfile(path, dtype=files.dtype) for path in (files.train, files.validation)
    )
    assert len(validation) == round(0.05 * (len(train) + len(validation)))
    assert tokenizer.decode(np.concatenate([train, validation])[:-1]) == text


def test_token_files_are_reused_until_something_changes(books, tokenizer, tmp_path):
    passes = []

    def corpus(identity: str) -> Corpus:
        def documents():
            passes.append(identity)
            return iter([Document(text, text) for text in books])

        return Corpus("a test", identity, documents)

    first = prepare_tokens(corpus("a"), tokenizer, tmp_path)
    assert prepare_tokens(corpus("a"), tokenizer, tmp_path) == first
    assert passes == ["a"]
    assert prepare_tokens(corpus("b"), tokenizer, tmp_path) != first
    other = train_tokenizer(_corpus(books), vocab_size=280)
    assert prepare_tokens(corpus("a"), other, tmp_path) != first
    assert prepare_tokens(corpus("a"), tokenizer, tmp_path, max_tokens=500) != first
    assert passes == ["a", "b", "a", "a"]


def test_damaged_token_file_is_made_again(books, tokenizer, tmp_path):
    files = prepare_tokens(_corpus(books), tokenizer, tmp_path)
    whole = files.train.read_bytes()
    files.train.write_bytes(whole[:-10])
    assert prepare_tokens(_corpus(books), tokenizer, tmp_path) == files
    assert files.train.read_bytes() == whole


def test_interrupted_tokenising_leaves_nothing_to_reuse(books, tokenizer, tmp_path):
    def documents():
        yield from (Document(text, text) for text in books[:150])
        raise ValueError("disk gone")

    with pytest.raises(ValueError, match="disk gone"):
        prepare_tokens(Corpus("a test", "x", documents), tokenizer, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_max_tokens_stops_early(books, tokenizer, tmp_path):
    files = prepare_tokens(_corpus(books * 20), tokenizer, tmp_path, max_tokens=2000)
    count = files.train.stat().st_size // 2
    assert 2000 <= count < 20_000


def test_empty_corpus(tokenizer, tmp_path):
    with pytest.raises(ValueError, match="empty corpus: a test holds no text"):
        prepare_tokens(_corpus(["", ""]), tokenizer, tmp_path)


def _tokenizer_with_gaps(words: list[str], step: int) -> PreTrainedTokenizerFast:
    vocabulary = {word: number * step for number, word in enumerate(["<end>", *words])}
    model = Tokenizer(models.WordLevel(vocabulary, "<end>"))
    model.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=model, eos_token="<end>")


def test_ids_with_gaps_need_as_many_rows_as_the_largest_says(books, tmp_path):
    words = sorted({word for text in books for word in text.split()})
    for step in (1, 1000):
        tokenizer = _tokenizer_with_gaps(words, step)
        assert vocabulary_size(tokenizer) == len(words) * step + 1
        files = prepare_tokens(_corpus(books), tokenizer, tmp_path)
        assert files.dtype == ("uint16" if step == 1 else "uint32")
        tokens = np.fromfile(files.train, dtype=files.dtype)
        assert tokens.max() == len(words) * step
    tokenizer.add_tokens(["another"])
    assert vocabulary_size(tokenizer) > len(words) * 1000


def test_a_held_out_part_of_nearly_nothing_is_filled_from_the_end(tokenizer, tmp_path):
    """The documents that a hash holds out may be the short ones, as files without content are."""
    texts = [f"{number} " + "some words to train on " * 40 for number in range(60)]
    held_out = [held for _, held in split_documents(_corpus(texts))]
    assert 0 < sum(held_out) < 10
    documents = [
        Document(key, "short" if held else key) for key, held in zip(texts, held_out, strict=True)
    ]
    files = prepare_tokens(Corpus("a test", "x", lambda: iter(documents)), tokenizer, tmp_path)
    train, held = (np.fromfile(path, dtype="uint16") for path in (files.train, files.validation))
    assert len(held) == round(0.05 * (len(train) + len(held)))
    short = sum(held_out) * (len(tokenizer("short")["input_ids"]) + 1)
    whole = np.concatenate([train, held[short:]])
    written = tokenizer.decode(whole).split(tokenizer.eos_token)[:-1]
    assert written == [text for text, held in zip(texts, held_out, strict=True) if not held]


def test_a_held_out_part_shorter_than_a_row_is_one_shorter_row(books, tokenizer, tmp_path):
    files = prepare_tokens(_corpus(books), tokenizer, tmp_path)
    count = files.validation.stat().st_size // 2
    rows = TokenBlocks(files, count + 1, "validation", max_blocks=4)
    assert [row["input_ids"].shape for row in rows] == [(count,)]
    files.validation.write_bytes(files.validation.read_bytes()[:2])
    with pytest.raises(ValueError, match=r"validation part has 1 tokens.*--eval-every 0"):
        TokenBlocks(files, 16, "validation")


def test_a_trained_tokenizer_pads_where_a_batch_of_prompts_needs_it(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    assert load_tokenizer(tmp_path).padding_side == "left"


def test_vocabulary_above_65536_uses_four_bytes(books, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(type(tokenizer), "__len__", lambda self: 70_000)
    assert prepare_tokens(_corpus(books), tokenizer, tmp_path).dtype == "uint32"


# Blocks


def test_blocks_cover_the_file_in_order(books, tokenizer, tmp_path):
    files = prepare_tokens(_corpus(books), tokenizer, tmp_path)
    tokens = np.fromfile(files.train, dtype=files.dtype)
    blocks = TokenBlocks(files, 32)
    assert len(blocks) == len(tokens) // 32
    rows = torch.stack([blocks[index]["input_ids"] for index in range(len(blocks))])
    assert rows.dtype == torch.int64
    assert np.array_equal(rows.flatten(), tokens[: len(blocks) * 32])
    assert torch.equal(blocks[3]["labels"], blocks[3]["input_ids"])
    assert "position_ids" not in blocks[3]


def test_separated_documents_restart_positions_and_hide_first_tokens(tmp_path):
    path = tmp_path / "train.bin"
    np.array([5, 6, 0, 7, 0, 0, 8, 9], dtype="uint16").tofile(path)
    files = data_module.TokenFiles(path, path, "uint16", 0, "x")
    block = TokenBlocks(files, 8, separate_documents=True)[0]
    assert block["position_ids"].tolist() == [0, 1, 2, 0, 1, 0, 0, 1]
    assert block["labels"].tolist() == [-100, 6, 0, -100, 0, -100, -100, 9]


def test_max_blocks_are_spread_over_the_file(tmp_path):
    path = tmp_path / "train.bin"
    np.arange(1, 101, dtype="uint16").tofile(path)
    blocks = TokenBlocks(data_module.TokenFiles(path, path, "uint16", 0, "x"), 10, max_blocks=3)
    assert [blocks[index]["input_ids"][0].item() for index in range(len(blocks))] == [1, 31, 61]


def test_corpus_shorter_than_one_block(books, tokenizer, tmp_path):
    files = prepare_tokens(_corpus(books[:2]), tokenizer, tmp_path)
    with pytest.raises(
        ValueError, match=r"corpus too short: its train part has \d+ tokens, one block needs 9999"
    ):
        TokenBlocks(files, 9999)


def test_another_process_made_the_same_tokens_meanwhile(books, tokenizer, tmp_path, monkeypatch):
    made = []

    def tokenise(*arguments):
        counts = original(*arguments)
        if not made:
            made.append(None)
            monkeypatch.setattr(os, "getpid", lambda: -1)
            made[0] = prepare_tokens(_corpus(books), tokenizer, tmp_path)
        return counts

    original = data_module._tokenise
    monkeypatch.setattr(data_module, "_tokenise", tokenise)
    files = prepare_tokens(_corpus(books), tokenizer, tmp_path)
    assert made == [files]
    assert files.train.stat().st_size > 0
    assert [path.name for path in tmp_path.iterdir()] == [files.train.parent.name]
