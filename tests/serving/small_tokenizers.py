"""Small tokenizers for tests: byte-level as GPT-2's, and byte fallback as Llama 2's."""

from functools import lru_cache

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode


@lru_cache
def byte_level() -> PreTrainedTokenizerFast:
    """256 bytes, some merges (one within a character), BOS, EOS, and a token without text."""
    names = bytes_to_unicode()
    vocab = {names[byte]: byte for byte in range(256)}
    merges = []
    for left, right in [
        (b"t", b"h"),
        (b"th", b"e"),
        (b" ", b"a"),
        (b"\xe2", b"\x82"),
        (b"o", b"n"),
    ]:
        pair = ["".join(names[byte] for byte in part) for part in (left, right)]
        merges.append(tuple(pair))
        vocab["".join(pair)] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


@lru_cache
def byte_fallback() -> PreTrainedTokenizerFast:
    """Words after "▁", bytes as <0xHH>, and a decoder that strips the first space."""
    vocab = {"<unk>": 0, **{f"<0x{byte:02X}>": 1 + byte for byte in range(256)}}
    for word in ["▁", "▁the", "▁a", "c", "a", "t", "▁cat", "s", "€"]:
        vocab[word] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens(
        [AddedToken("<s>", special=True), AddedToken("</s>", special=True)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
