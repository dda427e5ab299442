"""Tokens to train on: a byte-level BPE tokenizer, memory-mapped token files, blocks of them.

Over 300 lines in one file: the stages of one pipeline, each fed by the one before.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.utils.data import Dataset
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from mor.data.corpus import HELD_OUT, Corpus, split_documents

__all__ = [
    "TokenBlocks",
    "TokenFiles",
    "has_tokenizer",
    "load_tokenizer",
    "prepare_tokens",
    "train_tokenizer",
    "vocabulary_size",
]

END_OF_TEXT = "<|endoftext|>"

#: Raise when the token files of the same text and tokenizer would come out different.
_VERSION = 2
#: Characters encoded at once: a longer text is cut at a line end, so that the tokenizer needs no
#: more memory for one huge document than for a small one. The text itself is in memory whole.
_PIECE = 1 << 18
_BATCH = 64
#: A held-out part with less of the tokens than this is filled up.
_FEWEST_HELD_OUT = HELD_OUT / 5


def train_tokenizer(
    corpus: Corpus, vocab_size: int = 4096, max_characters: int = 20_000_000
) -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE tokenizer on the start of a corpus, leaving out held-out documents.

    Args:
        corpus: the text.
        vocab_size: entries, among them the 256 bytes and the end-of-text token (id 0, also used for
            padding).
        max_characters: how much text to look at.

    Raises:
        ValueError: `vocab_size` below 257, or an empty corpus.
    """
    if vocab_size < 257:
        raise ValueError(
            f"vocab_size must be at least 257 (256 bytes and {END_OF_TEXT}), got {vocab_size}"
        )
    characters = 0

    def texts() -> Iterator[str]:
        nonlocal characters
        for text, held_out in split_documents(corpus):
            if not held_out:
                characters += len(text)
                yield from _pieces(text)
            if characters >= max_characters:
                return

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(
        texts(),
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[END_OF_TEXT],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    if characters == 0:
        raise ValueError(f"empty corpus: {corpus.name} holds no text")
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=END_OF_TEXT,
        bos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        padding_side="left",  # as a batch of prompts needs it
    )


def has_tokenizer(folder: Path) -> bool:
    """Whether a model's folder holds a tokenizer, by the names of its files."""
    patterns = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.*")
    return any(path for pattern in patterns for path in folder.glob(pattern))


def load_tokenizer(source: str | Path) -> PreTrainedTokenizerBase:
    """Loads a tokenizer from a directory or by its Hugging Face name.

    Raises:
        ValueError: nothing there, or a tokenizer without an end-of-text token.
    """
    folder = Path(source)
    if (folder / "config.json").exists() and not has_tokenizer(folder):
        raise ValueError(
            f"there is no tokenizer in {folder}: save the model's there, by "
            f"AutoTokenizer.from_pretrained(NAME).save_pretrained({str(folder)!r}), or give "
            "--tokenizer NAME where the command has it"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
    except Exception as error:  # as many types as there are ways for a name to be wrong
        lines = [line.strip() for line in str(error).strip().splitlines()] or [type(error).__name__]
        reason = " ".join(lines) if lines[0].endswith(":") else lines[0]
        raise ValueError(f"cannot load a tokenizer from {str(source)!r}: {reason}") from error
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"the tokenizer of {str(source)!r} has no end-of-text token (eos_token); name another "
            "(--tokenizer)"
        )
    return tokenizer


def vocabulary_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """Rows that an embedding needs: the largest id and one more.

    `len(tokenizer)` counts entries, and ids may have gaps.
    """
    return max(len(tokenizer), 1 + max(tokenizer.get_vocab().values(), default=-1))


@dataclass(frozen=True)
class TokenFiles:
    """Token files made by `prepare_tokens`: documents joined, each with the end-of-text token.

    Attributes:
        train: file of the training part.
        validation: file of the held-out part.
        dtype: of the tokens in them.
        end_of_text: the token that ends each document.
        identity: changes with the text, the tokenizer and the code's version.
    """

    train: Path
    validation: Path
    dtype: str
    end_of_text: int
    identity: str

    def describe(self) -> str:
        """Tokens and documents, for people."""
        meta = json.loads((self.train.parent / "meta.json").read_text())
        tokens, empty = meta["tokens"], meta["empty"]
        left_out = f"; {empty:,} without text left out" if empty else ""
        return (
            f"{tokens['train']:,} to train on, {tokens['validation']:,} held out, of "
            f"{meta['documents']:,} document{'s' * (meta['documents'] != 1)}{left_out}"
        )


def prepare_tokens(
    corpus: Corpus,
    tokenizer: PreTrainedTokenizerBase,
    directory: str | Path,
    max_tokens: int | None = None,
) -> TokenFiles:
    """Tokenises a corpus once into memory-mapped files.

    The files lie in a folder named after a hash of the corpus, the tokenizer and this code's
    version: they are reused exactly when all three are unchanged. The folder appears by a rename
    after it is complete, so a process killed on the way leaves nothing that could be mistaken for
    it.

    Args:
        corpus: the text; about 5% of it is held out for validation (`mor.corpus.split_documents`).
        tokenizer: fast or slow, with an end-of-text token.
        directory: where to put the folder.
        max_tokens: stop after this many training tokens; None takes everything.

    Raises:
        ValueError: empty corpus.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no end-of-text token (eos_token)")
    identity = _identity(corpus, tokenizer, max_tokens)
    dtype = "uint16" if vocabulary_size(tokenizer) <= 1 << 16 else "uint32"
    folder = Path(directory) / f"tokens-{identity}"
    if not _is_complete(folder, identity):
        partial = folder.with_name(f".{folder.name}.{os.getpid()}")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            counts, documents = _tokenise(corpus, tokenizer, partial, dtype, max_tokens)
            sizes = {name: count * np.dtype(dtype).itemsize for name, count in counts.items()}
            meta: dict[str, Any] = {
                "identity": identity,
                "corpus": corpus.name,
                "tokens": counts,
                "bytes": sizes,
            }
            meta |= documents
            (partial / "meta.json").write_text(json.dumps(meta, indent=2) + "\n")
            if folder.exists() and not _is_complete(folder, identity):
                shutil.rmtree(folder)
            try:
                partial.rename(folder)
            except OSError:
                if not _is_complete(folder, identity):  # else another process was quicker
                    raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return TokenFiles(
        folder / "train.bin", folder / "validation.bin", dtype, tokenizer.eos_token_id, identity
    )


class TokenBlocks(Dataset[dict[str, torch.Tensor]]):
    """Fixed-length blocks of a token file, for `transformers.Trainer`.

    Args:
        files: what `prepare_tokens` returned.
        block_length: tokens in a block; the rest at the end of the file is left out. A shorter
            validation part is one shorter block.
        part: which of the files.
        separate_documents: give `position_ids` that restart at each document, so that attention
            does not cross from one document into the next, and no document's first token is
            predicted from the one before.
        max_blocks: use this many blocks at most, spread evenly over the file.

    Raises:
        ValueError: fewer tokens than one block.
    """

    def __init__(
        self,
        files: TokenFiles,
        block_length: int,
        part: Literal["train", "validation"] = "train",
        *,
        separate_documents: bool = False,
        max_blocks: int | None = None,
    ) -> None:
        """Maps the file."""
        path = files.validation if part == "validation" else files.train
        if block_length < 2:
            raise ValueError(f"block_length must be at least 2, got {block_length}")
        count = path.stat().st_size // np.dtype(files.dtype).itemsize
        if part == "validation" and 2 <= count < block_length:
            block_length = count
        if count < block_length:
            ways = "more text or a smaller --seq-len"
            if part == "validation":
                ways = "more text, or no evaluation: --eval-every 0"
            raise ValueError(
                f"corpus too short: its {part} part has {count} tokens, one block needs "
                f"{block_length}; give {ways}"
            )
        self.tokens = np.memmap(path, dtype=files.dtype, mode="r")
        self.end_of_text = files.end_of_text
        self.block_length = block_length
        self.separate_documents = separate_documents
        blocks = count // block_length
        self.blocks = np.arange(blocks)
        if max_blocks is not None and max_blocks < blocks:
            self.blocks = np.arange(max_blocks) * blocks // max_blocks

    def __len__(self) -> int:
        """Number of blocks."""
        return len(self.blocks)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """Returns input_ids and labels [S], and position_ids [S] where documents are separated."""
        start = int(self.blocks[index]) * self.block_length
        ids = torch.from_numpy(self.tokens[start : start + self.block_length].astype(np.int64))
        if not self.separate_documents:
            return {"input_ids": ids, "labels": ids.clone()}
        positions = torch.arange(self.block_length)
        starts = torch.zeros_like(positions)
        starts[1:] = torch.where(ids[:-1] == self.end_of_text, positions[1:], 0)
        positions = positions - starts.cummax(0).values
        return {
            "input_ids": ids,
            "labels": ids.masked_fill(positions == 0, -100),
            "position_ids": positions,
        }


def _identity(corpus: Corpus, tokenizer: PreTrainedTokenizerBase, max_tokens: int | None) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    vocabulary = backend.to_str() if backend else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    parts: list[Any] = [_VERSION, corpus.identity, vocabulary, tokenizer.eos_token_id, max_tokens]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def _is_complete(folder: Path, identity: str) -> bool:
    try:
        meta = json.loads((folder / "meta.json").read_text())
        sizes = {name: (folder / f"{name}.bin").stat().st_size for name in meta["bytes"]}
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return meta.get("identity") == identity and sizes == meta["bytes"]


def _tokenise(
    corpus: Corpus,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    dtype: str,
    max_tokens: int | None,
) -> tuple[dict[str, int], dict[str, int]]:
    """Writes both files; returns their tokens, and the numbers of full and empty documents."""
    counts = {"train": 0, "validation": 0}
    documents = {"documents": 0, "empty": 0}
    paths = {name: folder / f"{name}.bin" for name in counts}
    batch: list[tuple[str, str, bool]] = []

    with paths["train"].open("wb") as train, paths["validation"].open("wb") as validation:
        files = {"train": train, "validation": validation}

        def flush() -> None:
            # The text of a document may spell a special token; it is text, not an end of document.
            encoded = tokenizer(
                [piece for piece, _, _ in batch],
                add_special_tokens=False,
                split_special_tokens=True,
                verbose=False,
            )["input_ids"]
            for (_, part, ends), ids in zip(batch, encoded, strict=True):
                ids = [*ids, tokenizer.eos_token_id] if ends else ids
                np.asarray(ids, dtype=dtype).tofile(files[part])
                counts[part] += len(ids)
            batch.clear()

        for text, held_out in split_documents(corpus):
            documents["documents" if text else "empty"] += 1
            if not text:
                continue
            pieces = list(_pieces(text))
            for number, piece in enumerate(pieces, 1):
                batch.append((piece, "validation" if held_out else "train", number == len(pieces)))
                if len(batch) == _BATCH:
                    flush()
            if max_tokens is not None and counts["train"] >= max_tokens:
                break
        if batch:
            flush()
    if sum(counts.values()) == 0:
        raise ValueError(f"empty corpus: {corpus.name} holds no text")
    # Few documents, or short ones held out by chance.
    if counts["validation"] < _FEWEST_HELD_OUT * sum(counts.values()):
        _hold_out_end(paths, counts, dtype)
    return counts, documents


def _hold_out_end(paths: dict[str, Path], counts: dict[str, int], dtype: str) -> None:
    """Fills the held-out part with the end of the training text."""
    wanted = max(2, round(sum(counts.values()) * HELD_OUT))  # one token has none to predict
    moved = min(counts["train"], wanted - counts["validation"])
    size = moved * np.dtype(dtype).itemsize
    with paths["train"].open("r+b") as train, paths["validation"].open("ab") as validation:
        kept = train.seek(-size, os.SEEK_END)
        shutil.copyfileobj(train, validation)
        train.truncate(kept)
    counts["train"] -= moved
    counts["validation"] += moved


def _pieces(text: str) -> Iterator[str]:
    start = 0
    while len(text) - start > _PIECE:
        end = text.rfind("\n", start, start + _PIECE) + 1
        end = end if end > start else start + _PIECE
        yield text[start:end]
        start = end
    yield text[start:]
