"""Text to train on, its tokenizer and its token files."""

from mor.data.corpus import Corpus, Document, clean_text, open_corpus, split_documents
from mor.data.tokens import (
    TokenBlocks,
    TokenFiles,
    has_tokenizer,
    load_tokenizer,
    prepare_tokens,
    train_tokenizer,
    vocabulary_size,
)

__all__ = [
    "Corpus",
    "Document",
    "TokenBlocks",
    "TokenFiles",
    "clean_text",
    "has_tokenizer",
    "load_tokenizer",
    "open_corpus",
    "prepare_tokens",
    "split_documents",
    "train_tokenizer",
    "vocabulary_size",
]
