"""Tokens to bytes and back, from many threads."""

from concurrent.futures import ThreadPoolExecutor

import pytest
from transformers import PreTrainedTokenizerFast

from mor.serving.vocabulary import Vocabulary, incomplete_bytes

from .small_tokenizers import byte_fallback, byte_level

TEXTS = ["the cat sat on a mat", "  two\n\nlines </s>", "grüße €5 日本語 👍🏽", ""]


@pytest.mark.parametrize("make", [byte_level, byte_fallback])
@pytest.mark.parametrize("special", [False, True])
def test_encode_is_that_of_transformers(make, special):
    vocabulary = Vocabulary(make())
    for text in TEXTS:
        expected = make()(text, add_special_tokens=special)["input_ids"]
        assert vocabulary.encode(text, special) == expected


def test_many_threads_encode_while_the_tokenizer_pads():
    """Transformers sets padding on the shared tokenizer: "Already borrowed" in another thread."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=byte_level().backend_tokenizer, eos_token="</s>", pad_token="</s>"
    )
    tokenizer(TEXTS, padding="max_length", max_length=40, truncation=True)
    vocabulary = Vocabulary(tokenizer)
    expected = [vocabulary.encode(text) for text in TEXTS]
    assert [len(ids) for ids in expected] != [40] * 4
    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(vocabulary.encode, TEXTS * 200))
    assert found == expected * 200


@pytest.mark.parametrize("text", ["", "a", "é", "€", "👍"])
def test_incomplete_bytes(text):
    data = b"x" + text.encode()
    for cut in range(1, len(data) + 1):
        assert incomplete_bytes(data[:cut]) == (cut - 1) % max(1, len(data) - 1)
    assert incomplete_bytes(b"\xff\xff") == 0


def test_bytes_of_a_token():
    level, words = Vocabulary(byte_level()), Vocabulary(byte_fallback())
    assert level.token_text(0xE2) == "bytes:\\xe2" != level.token_text(0x82)
    assert level.token_text(ord("a")) == "a"
    assert words.token_bytes(1 + 0xE2) == b"\xe2"
    assert words.token_bytes(words.tokenizer.convert_tokens_to_ids("▁cat")) == b" cat"
    eos = level.tokenizer.eos_token_id
    assert (level.token_bytes(eos), level.token_bytes(eos, True)) == (b"</s>", b"")
    assert level.token_bytes(level.size) == b""
