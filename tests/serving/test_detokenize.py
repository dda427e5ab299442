"""Text that comes piece by piece is the text decoded at once, whatever the bytes and the stops."""

from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers.decoders import DecodeStream

from mor.serving.detokenize import TextStream, prompt_text
from mor.serving.vocabulary import Vocabulary

from .small_tokenizers import byte_fallback, byte_level

BYTES = Vocabulary(byte_level())
WORDS = Vocabulary(byte_fallback())

texts = st.text(st.sampled_from("ab \nthe€é日👍\u200d\ufffd\u0301"), max_size=12)
any_bytes = st.lists(st.sampled_from([*b"ab the", 0xE2, 0x82, 0xAC, 0xF0, 0x9F, 0x91, 0x8D, 0xFF]))
#: Bytes that are characters, bytes that are none, merged tokens and special ones.
token_lists = st.one_of(
    texts.map(lambda text: BYTES.tokenizer.encode(text, add_special_tokens=False)),
    any_bytes,
    st.lists(st.integers(0, BYTES.size - 1), max_size=60),
)


def joined(stream: TextStream, ids: list[int]) -> str:
    text = ""
    for token in ids:
        text += stream.push(token)
        if stream.stopped is not None:
            return text
    return text + stream.finish()


def cut_at_stop(pieces: list[str], stops: list[str], min_tokens: int) -> tuple[str, str | None]:
    """The rule said plainly, over characters: the first end of a match, then the longest match."""
    text = "".join(pieces)
    allowed_from = len("".join(pieces[: max(0, min_tokens - 1)]))
    for end in range(allowed_from + 1, len(text) + 1):
        for stop in sorted(stops, key=len, reverse=True):
            if text[:end].endswith(stop):
                return text[: end - len(stop)], stop
    return text, None


@settings(max_examples=400, deadline=None)
@given(prompt=texts, ids=token_lists, skip=st.booleans())
@example(prompt="a", ids=[0xFF] * 200, skip=True)
@example(prompt="a", ids=[0xE2, 0x82] * 60, skip=True)
@example(prompt="", ids=[0xEF, 0xBF, 0xBD], skip=True)
def test_streamed_text_is_the_text_decoded_at_once(prompt, ids, skip):
    prompt_ids = BYTES.tokenizer.encode(prompt, add_special_tokens=False)
    stream = TextStream(BYTES, prompt_ids, skip_special_tokens=skip)
    assert joined(stream, ids) == BYTES.decode(ids, skip)


@settings(max_examples=200, deadline=None)
@given(prompt_ids=any_bytes, ids=any_bytes)
@example(prompt_ids=[0xE2, BYTES.tokenizer.eos_token_id], ids=[0x82, 0xAC])
def test_text_after_a_prompt_that_ends_within_a_character(prompt_ids, ids):
    stream = TextStream(BYTES, prompt_ids)
    assert prompt_text(BYTES, prompt_ids) + joined(stream, ids) == BYTES.decode(prompt_ids + ids)


@settings(max_examples=400, deadline=None)
@given(
    ids=token_lists,
    stops=st.lists(st.text(st.sampled_from("ab the€é\ufffd"), min_size=1, max_size=4), max_size=3),
    min_tokens=st.integers(0, 8),
)
@example(ids=list(b"abab"), stops=["ab"], min_tokens=3)
@example(ids=list(b"aaaa"), stops=["aa"], min_tokens=3)
@example(ids=list(b"abcd"), stops=["abcd", "bc"], min_tokens=0)
def test_stop_strings_end_the_text_by_the_rule(ids, stops, min_tokens):
    # Pieces in which characters become certain; stops are only tried on those.
    plain = TextStream(BYTES, [])
    pieces = [plain.push(token) for token in ids] + [plain.finish()]
    if len(ids) < min_tokens:
        expected = "".join(pieces), None
    else:
        expected = cut_at_stop(pieces, stops, min_tokens)
    stream = TextStream(BYTES, [], stop=stops, min_tokens=min_tokens)
    assert (joined(stream, ids), stream.stopped) == expected


@settings(max_examples=200, deadline=None)
@given(ids=st.lists(st.integers(257, WORDS.size - 1), max_size=40), text=texts)
def test_streamed_text_of_a_tokenizer_with_byte_fallback(ids, text):
    # Bytes of whole characters: of others, what this tokenizer writes for the first of two bytes
    # changes with the second.
    ids = ids + [1 + byte for byte in text.encode()]
    prompt = WORDS.tokenizer.encode("the cat", add_special_tokens=False)
    whole = WORDS.decode(prompt + ids)
    assert WORDS.decode(prompt) + joined(TextStream(WORDS, prompt), ids) == whole


def test_trap_1_partial_utf8_waits_and_the_tail_is_flushed():
    stream = TextStream(BYTES, [])
    assert [stream.push(byte) for byte in "€".encode()] == ["", "", "€"]
    assert stream.push(0xF0) == ""
    assert stream.finish() == "\ufffd"


def test_trap_1_a_replacement_character_of_the_text_is_written():
    stream = TextStream(BYTES, [])
    ids = BYTES.tokenizer.encode("x\ufffdy", add_special_tokens=False)
    assert [stream.push(token) for token in ids] == ["x", "", "", "\ufffd", "y"]
    assert stream.finish() == ""


def test_trap_1_the_prompt_decides_about_the_first_space():
    prompt = WORDS.tokenizer.encode("the", add_special_tokens=False)
    cat = WORDS.tokenizer.convert_tokens_to_ids("▁cat")
    assert TextStream(WORDS, prompt).push(cat) == " cat"
    assert TextStream(WORDS, []).push(cat) == "cat"


def test_trap_1_invalid_bytes_are_not_held_for_ever_nor_remembered():
    stream = TextStream(BYTES, [])
    assert "".join(stream.push(0xFF) for _ in range(1000)) == 1000 * "\ufffd"
    assert len(stream._decoder._window) <= 16
    library = DecodeStream(ids=[])
    backend = BYTES.tokenizer.backend_tokenizer
    assert all(library.step(backend, 0xFF) is None for _ in range(1000))


def test_trap_1_an_id_without_a_token_has_no_text():
    stream = TextStream(BYTES, [])
    assert [stream.push(BYTES.size + 5), stream.push(ord("a"))] == ["", "a"]


@given(text=texts)
def test_as_decode_stream_where_that_is_right(text):
    prompt = BYTES.tokenizer.encode("the ", add_special_tokens=False)
    library, backend = DecodeStream(ids=prompt), BYTES.tokenizer.backend_tokenizer
    stream = TextStream(BYTES, prompt)
    for token in BYTES.tokenizer.encode(text.replace("\ufffd", ""), add_special_tokens=False):
        assert stream.push(token) == (library.step(backend, token) or "")


def test_trap_2_a_stop_string_spans_tokens_and_is_held_back():
    stream = TextStream(BYTES, [], stop=["END"])
    assert [stream.push(byte) for byte in b"xEENx"] == ["x", "", "E", "", "ENx"]
    assert [stream.push(byte) for byte in b"yEND"] == ["y", "", "", ""]
    assert stream.stopped == "END"
    assert stream.finish() == ""


def test_trap_2_what_is_held_is_flushed_at_another_end():
    stream = TextStream(BYTES, [], stop=["END"])
    assert "".join(stream.push(byte) for byte in b"xEN") == "x"
    assert stream.finish() == "EN"
    assert stream.stopped is None


def test_trap_2_the_match_that_is_complete_first_wins():
    stream = TextStream(BYTES, [], stop=["bcd", "abcde", "cd"])
    assert joined(stream, list(b"xabcde")) == "xa"
    assert stream.stopped == "bcd"


def test_trap_2_no_match_within_the_prompt():
    stream = TextStream(BYTES, list(b"ab"), stop=["abc", "ab"])
    assert joined(stream, list(b"cd")) == "cd"


def test_trap_2_no_stop_before_min_tokens():
    stream = TextStream(BYTES, [], stop=["ab"], min_tokens=4)
    assert joined(stream, list(b"abxabx")) == "abx"
    stream = TextStream(BYTES, [], stop=["ab"], min_tokens=4)
    assert joined(stream, list(b"abab")) == "ab"
