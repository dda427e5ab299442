"""Text to train on: local files, a Hugging Face dataset, or the standard library's own sources.

The last one is the default: about 9 MB of real text (code, docstrings, the language reference of
`pydoc_data`) that is on every machine that runs Python, so training needs no network.
"""

import codecs
import hashlib
import itertools
import json
import re
import sysconfig
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TextIO

__all__ = ["Corpus", "Document", "clean_text", "open_corpus", "read_text", "split_documents"]

#: Share of the documents that is held out for validation.
HELD_OUT = 0.05
#: With fewer documents than this, the end of the text is held out instead of whole documents.
FEW_DOCUMENTS = 40

_SURROGATES = re.compile("[\ud800-\udfff]")
#: UTF-32's little-endian mark begins with UTF-16's.
_MARKS = {
    "utf-32": (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE),
    "utf-16": (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE),
}
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
    """

    name: str
    identity: str
    documents: Callable[[], Iterator[Document]]
    files: int = 0
    skipped: Mapping[str, int] = field(default_factory=dict)

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


def read_text(path: Path) -> str:
    """Reads a text file: UTF-8, or UTF-16 or UTF-32 with a byte-order mark; the mark is left out.

    Raises:
        ValueError: it cannot be read, or is neither.
    """
    with _opened(path) as file:
        return file.read()


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
            for record in _read(path, text_field):
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


def _read(path: Path, text_field: str) -> Iterator[str]:
    if path.suffix == ".parquet":
        try:
            yield from _read_parquet(path, text_field)
        except OSError as error:
            raise ValueError(f"cannot read {path}: {error.strerror or error}") from error
    elif path.suffix == ".jsonl":
        with _opened(path) as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    record = _json(line, path, f" in line {number}")
                    yield _text_of(record, text_field, f"{path}, line {number}")
    elif path.suffix == ".json":
        records = _json(read_text(path), path)
        for number, record in enumerate(records if isinstance(records, list) else [records], 1):
            yield _text_of(record, text_field, f"{path}, record {number}")
    else:
        yield read_text(path)


@contextmanager
def _opened(path: Path) -> Iterator[TextIO]:
    """The file as text, whatever its byte-order mark says; errors name it."""
    try:
        with path.open("rb") as file:
            start = file.read(5)
        # A mark alone is no text.
        encoding = "utf-8-sig"
        for name, marks in _MARKS.items():
            if start.startswith(marks) and len(start) > len(marks[0]):
                encoding = name
                break
        with path.open(encoding=encoding) as text:
            yield text
    except UnicodeError as error:
        raise _not_text(path, encoding) from error
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror or error}") from error


def _not_text(path: Path, encoding: str) -> ValueError:
    """Finds the place, which a decoder that works through a file in parts does not know."""
    name = encoding.removesuffix("-sig").upper()
    place = ""
    if encoding == "utf-8-sig":  # in which no character but a line's end holds its byte
        done = 0
        with path.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                try:
                    line.decode()
                except UnicodeDecodeError as error:
                    place = f" (byte {done + error.start}) in line {number}"
                    break
                done += len(line)
    return ValueError(
        f"cannot read {path}: not {name} text{place}; convert it, as with iconv -f LATIN1 -t UTF-8"
    )


def _json(text: str, path: Path, place: str = "") -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        where = f"column {error.colno}" if place else f"line {error.lineno}, column {error.colno}"
        raise ValueError(f"cannot read {path}: not JSON{place} ({error.msg}: {where})") from error
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits, deep nesting
        raise ValueError(
            f"cannot read {path}: not JSON that Python reads{place} ({error})"
        ) from error


def _read_parquet(path: Path, text_field: str) -> Iterator[str]:
    import pyarrow
    from pyarrow import parquet

    try:
        file = parquet.ParquetFile(path)
        if text_field not in file.schema_arrow.names:
            raise _missing_field(text_field, file.schema_arrow.names, str(path))
        for batch in file.iter_batches(columns=[text_field]):
            for text in batch.column(0).to_pylist():
                yield _text_of({text_field: text}, text_field, str(path))
    except pyarrow.ArrowException as error:
        raise ValueError(f"cannot read {path}: {str(error).splitlines()[0]}") from error


def _missing_field(field: str, found: Iterable[str], where: str) -> ValueError:
    return ValueError(
        f"no text field {field!r} in {where}; its fields are "
        f"{', '.join(sorted(found)) or 'none'} (--text-field names one)"
    )


def _text_of(record: Any, field: str, where: str) -> str:
    if not isinstance(record, dict):
        raise ValueError(
            f"expected an object with a text field {field!r} in {where}, "
            f"got {type(record).__name__}"
        )
    if field not in record:
        raise _missing_field(field, record, where)
    if record[field] is None:
        return ""
    if not isinstance(record[field], str):
        raise ValueError(
            f"expected text in field {field!r} of {where}, got {type(record[field]).__name__}"
        )
    return record[field]


def _hub_corpus(name: str, text_field: str, config: str | None, split: str) -> Corpus:
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
            text = _text_of(record, text_field, f"dataset {name}")
            yield Document(text, text)

    return Corpus(f"dataset {name}", json.dumps([name, config, split, text_field]), documents)
