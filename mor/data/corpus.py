"""Text to train on: local files, a Hugging Face dataset, or the standard library's own sources.

The last one is the default: about 9 MB of real text (code, docstrings, the language reference of
`pydoc_data`) that is on every machine that runs Python, so training needs no network.
"""

import hashlib
import itertools
import json
import re
import sysconfig
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from mor._extras import extra
from mor.data.text_files import read_records, text_of

__all__ = ["Corpus", "Document", "clean_text", "open_corpus", "split_documents"]

#: Share of the documents that is held out for validation.
HELD_OUT = 0.05
#: With fewer documents than this, the end of the text is held out instead of whole documents.
FEW_DOCUMENTS = 40

_SURROGATES = re.compile("[\ud800-\udfff]")
_TEXT_SUFFIXES = (".txt", ".md", ".rst", ".py")
_SUFFIXES = (*_TEXT_SUFFIXES, ".jsonl", ".json", ".parquet")
#: Parts of the standard library that are tests, vendored or generated tables, or not there on every
#: machine.
_STDLIB_SKIPPED = frozenset(
    "test tests idle_test site-packages dist-packages idlelib lib2to3 turtledemo ensurepip "
    "encodings lib-dynload __pycache__".split()
)


class Document(NamedTuple):
    """A text with the key that decides, by a stable hash, whether it is held out."""

    key: str
    text: str


@dataclass(frozen=True)
class Corpus:
    """Documents from one source.

    Attributes:
        name: what messages call it.
        identity: a string that changes whenever the text may have changed.
        documents: starts a new pass over the documents, always in the same order; a record whose
            text is null or missing is an empty one.
        files: how many files are read; 0 where the source is not files.
        skipped: how many files of a directory are not read, by the end of their names.
        is_remote: whether it is a dataset of the Hugging Face hub, streamed.
    """

    name: str
    identity: str
    documents: Callable[[], Iterator[Document]]
    files: int = 0
    skipped: Mapping[str, int] = field(default_factory=dict)
    is_remote: bool = False

    def describe(self) -> str:
        """Name and number of files, for people."""
        parts = [self.name]
        if self.files > 1 or self.skipped:
            parts.append(f"{self.files:,} file{'s' * (self.files != 1)}")
        if self.skipped:
            largest = sorted(self.skipped.items(), key=lambda item: -item[1])[:5]
            kinds = ", ".join(f"{n:,} {kind or 'without ending'}" for kind, n in largest)
            parts.append(f"{sum(self.skipped.values()):,} not read ({kinds})")
        return ", ".join(parts)


def open_corpus(
    source: str | Path | None = None,
    *,
    text_field: str = "text",
    config: str | None = None,
    split: str = "train",
) -> Corpus:
    """Opens a source of text.

    Args:
        source: None for the standard library's sources; a .txt, .md, .rst, .py, .jsonl, .json or
            .parquet file, or a directory of them (searched recursively, hidden files skipped); else
            the name of a Hugging Face dataset, which is streamed.
        text_field: the field that holds the text in JSON, parquet and Hugging Face records.
        config: configuration of the Hugging Face dataset.
        split: split of the Hugging Face dataset.

    Returns:
        The corpus; its text is read when its documents are iterated.

    Raises:
        ValueError: no such path, a path without readable files, or a dataset that cannot be
            reached.

    Example:
        >>> open_corpus().name
        "the standard library's sources"
    """
    if source is None:
        root = Path(sysconfig.get_path("stdlib"))
        files = [
            path
            for path in sorted(root.rglob("*.py"))
            if not _STDLIB_SKIPPED.intersection(path.relative_to(root).parts)
            and not path.name.startswith("_sysconfigdata")
        ]
        return _local_corpus("the standard library's sources", root, files, text_field)
    path = Path(source)
    if path.is_file():
        if path.suffix not in _SUFFIXES:
            raise ValueError(
                f"cannot read {path}: expected a file ending in {', '.join(_SUFFIXES)}"
            )
        return _local_corpus(str(path), path.parent, [path], text_field)
    if path.is_dir():
        found = [
            file
            for file in sorted(path.rglob("*"))
            if not any(part.startswith(".") for part in file.relative_to(path).parts)
            and file.is_file()
        ]
        files = [file for file in found if file.suffix in _SUFFIXES]
        if not files:
            raise ValueError(
                f"no text in {path}: it holds no file ending in {', '.join(_SUFFIXES)}"
            )
        skipped = Counter(file.suffix for file in found if file.suffix not in _SUFFIXES)
        return _local_corpus(str(path), path, files, text_field, skipped)
    if (
        isinstance(source, Path)
        or path.suffix in _SUFFIXES
        or str(source).startswith(("/", ".", "~"))
    ):
        raise ValueError(f"no such file or directory: {source}")
    return _hub_corpus(str(source), text_field, config, split)


def split_documents(corpus: Corpus) -> Iterator[tuple[str, bool]]:
    """Yields each text with True if it is held out.

    Documents are held out by a hash of their key: the split does not depend on their order or
    number. A corpus of few documents (one long book, say) has none held out; there the caller holds
    out the end of the text.
    """
    documents = corpus.documents()
    first = list(itertools.islice(documents, FEW_DOCUMENTS))
    by_document = len(first) == FEW_DOCUMENTS
    for key, text in itertools.chain(first, documents):
        yield clean_text(text), by_document and _stable_fraction(key) < HELD_OUT


def clean_text(text: str) -> str:
    """Replaces halves of surrogate pairs, which no tokenizer takes, by U+FFFD.

    JSON may escape them, and cut texts do.
    """
    return _SURROGATES.sub("\ufffd", text)


def _stable_fraction(key: str) -> float:
    data = f"mor/{key}".encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.sha256(data).digest()[:8], "big") / 2**64


def _local_corpus(
    name: str,
    root: Path,
    files: list[Path],
    text_field: str,
    skipped: Mapping[str, int] | None = None,
) -> Corpus:
    def documents() -> Iterator[Document]:
        for path in files:
            for record in read_records(path, text_field):
                # A file is known by its name, so that an edit does not move it; a record has only
                # its text.
                is_file = path.suffix in _TEXT_SUFFIXES
                yield Document(path.relative_to(root).as_posix() if is_file else record, record)

    try:
        stats = [(path.relative_to(root).as_posix(), path.stat()) for path in files]
    except OSError as error:
        raise ValueError(f"cannot read {error.filename}: {error.strerror}") from error
    listing = [(file, stat.st_size, stat.st_mtime_ns) for file, stat in stats]
    identity = json.dumps([str(root.resolve()), text_field, listing])
    return Corpus(name, identity, documents, len(files), skipped or {})


def _hub_corpus(name: str, text_field: str, config: str | None, split: str) -> Corpus:
    with extra("train"):
        import datasets

    try:
        stream = datasets.load_dataset(name, config, split=split, streaming=True)
    except (
        Exception
    ) as error:  # the hub client raises a dozen types for "not there" and "not reachable"
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"{name!r} is no local path, and opening it as a Hugging Face dataset failed: {reason}"
        ) from error

    def documents() -> Iterator[Document]:
        for record in stream:
            text = text_of(record, text_field, f"dataset {name}")
            yield Document(text, text)

    identity = json.dumps([name, config, split, text_field])
    return Corpus(f"dataset {name}", identity, documents, is_remote=True)
