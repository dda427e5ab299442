"""Text from files: plain text, JSON, JSON lines and parquet; every error names the place."""

import codecs
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from mor._extras import extra

__all__ = ["read_records", "read_text", "text_of"]

#: UTF-32's little-endian mark begins with UTF-16's.
_MARKS = {
    "utf-32": (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE),
    "utf-16": (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE),
}


def read_text(path: Path) -> str:
    """Reads a text file: UTF-8, or UTF-16 or UTF-32 with a byte-order mark; the mark is left out.

    Raises:
        ValueError: it cannot be read, or is neither.
    """
    with _opened(path) as file:
        return file.read()


def read_records(path: Path, text_field: str) -> Iterator[str]:
    """Yields the texts of a file; an empty one for a record whose text is null.

    Raises:
        ValueError: it cannot be read.
    """
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
                    yield text_of(record, text_field, f"{path}, line {number}")
    elif path.suffix == ".json":
        records = _json(read_text(path), path)
        for number, record in enumerate(records if isinstance(records, list) else [records], 1):
            yield text_of(record, text_field, f"{path}, record {number}")
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
    with extra("train"):
        import pyarrow
        from pyarrow import parquet

    try:
        file = parquet.ParquetFile(path)
        if text_field not in file.schema_arrow.names:
            raise _missing_field(text_field, file.schema_arrow.names, str(path))
        for batch in file.iter_batches(columns=[text_field]):
            for text in batch.column(0).to_pylist():
                yield text_of({text_field: text}, text_field, str(path))
    except pyarrow.ArrowException as error:
        raise ValueError(f"cannot read {path}: {str(error).splitlines()[0]}") from error


def _missing_field(field: str, found: Iterable[str], where: str) -> ValueError:
    return ValueError(
        f"no text field {field!r} in {where}; its fields are "
        f"{', '.join(sorted(found)) or 'none'} (--text-field names one)"
    )


def text_of(record: Any, field: str, where: str) -> str:
    """The text of a record; empty if it is null.

    Raises:
        ValueError: no record, or no text in its field.
    """
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
