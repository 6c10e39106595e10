"""Reads a delimited, RecBole or Parquet file into columns, and knows on which line every record stands.

Polars parses; nothing is guessed. Only when something is wrong is the file walked again in Python, to name the line.
"""

from __future__ import annotations

import csv
import difflib
import gzip
import io
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import polars as pl

from fedrec.data.memory import check_fits, estimate_text
from fedrec.errors import ConfigError, DataError

FORMATS = ("auto", "csv", "tsv", "inter", "parquet")
_SUFFIXES = {".csv": "csv", ".tsv": "tsv", ".inter": "inter", ".item": "inter", ".user": "inter", ".parquet": "parquet"}
_SEPARATORS = {"csv": ",", "tsv": "\t", "inter": "\t"}
_UNIT = "\x1f"  # stands for separators of more than one character, which the parser does not know


@dataclass(frozen=True)
class TableFormat:
    """How a file is written.

    ``format`` is one of ``FORMATS`` (``auto`` goes by the name's ending, before any ``.gz``); ``separator`` replaces
    the format's own and may be longer than one character (``::``). Fields of csv and tsv files may be quoted with
    ``"``; RecBole files and files with a separator longer than one character know no quotes.
    """

    format: str = "auto"
    separator: str | None = None
    header: bool = True
    encoding: str = "utf-8"
    quotes: bool = True

    def resolve(self, path: Path) -> TableFormat:
        """The same with format, separator and quotes settled for ``path``; ConfigError where its name tells nothing."""
        kind = self.format
        if kind not in FORMATS:
            raise ConfigError(f"dataset.format={kind} is not one of {', '.join(FORMATS)}")
        if kind == "auto":
            ending = path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix
            kind = _SUFFIXES.get(ending.lower(), "csv" if self.separator else "")
            if not kind:
                raise ConfigError(
                    f"{path}: the name's ending does not tell the format; set dataset.format to csv, tsv, inter or "
                    "parquet, and dataset.separator where it is not the usual one"
                )
        if kind == "inter" and not self.header:
            raise ConfigError(f"{path}: RecBole files have a typed header; write dataset.header=true or format=tsv")
        if self.separator == "":
            raise ConfigError("dataset.separator is empty; write null for the format's own")
        separator = self.separator or _SEPARATORS.get(kind, ",")
        quotes = self.quotes and kind != "inter" and len(separator) == 1
        return TableFormat(kind, separator, self.header, self.encoding, quotes)


@dataclass(frozen=True)
class Table:
    """Columns of a file: text for delimited files, whatever the file holds for Parquet.

    ``names`` are the header's names, or ``()`` where there is no header; ``sha256`` is the file's digest as stored.
    """

    path: Path
    frame: pl.DataFrame
    names: tuple[str, ...]
    sha256: str
    _data: bytes = b""
    _format: TableFormat = TableFormat()

    def where(self, record: int) -> str:
        """``path, line 7`` (1-based, header and blank lines counted); ``path, row 7`` for Parquet."""
        if self._format.format == "parquet":
            return f"{self.path}, row {record + 1}"
        for number, (line, _) in enumerate(_records(self.path, self._data, self._format)):
            if number == record + self._format.header:
                return f"{self.path}, line {line}"
        return f"{self.path}, record {record + 1}"

    def index(self, column: str | int, key: str) -> int:
        """The position of a column given by name, or by 1-based number; ``key`` is the setting that gave it."""
        if isinstance(column, int):
            if not 1 <= column <= self.frame.width:
                raise DataError(
                    f"{self.path}: {key}={column}, but the columns are numbered from 1 to {self.frame.width}"
                )
            return column - 1
        if not self.names:
            raise DataError(
                f"{self.path}: {key}={column}, but the file is read without a header; "
                f"give the column's number (1 to {self.frame.width}) or set dataset.header=true"
            )
        found = [i for i, name in enumerate(self.names) if name == column]
        if len(found) > 1:
            raise DataError(f"{self.path}: two columns are called {column!r}; give the column's number in {key}")
        if not found:
            near = difflib.get_close_matches(column, self.names, 1)
            raise DataError(
                f"{self.path}: no column {column!r}; the columns are {', '.join(map(repr, self.names))}. "
                f"Set {key}={near[0] if near else '<one of these>'}, or dataset.header=false for a file without header"
            )
        return found[0]


def read_table(path: Path, format: TableFormat) -> Table:
    """The file as a table; DataError names the file, and the line of the first malformed record."""
    settled = format.resolve(path)
    if path.is_dir():
        raise DataError(f"{path} is a folder; give the file inside it")
    if not path.exists():
        beside = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        near = difflib.get_close_matches(path.name, beside, 1)
        raise DataError(f"{path}: no such file" + (f"; did you mean {near[0]}?" if near else ""))
    if settled.format == "parquet":
        return _read_parquet(path, settled)
    check_fits(estimate_text(path), path)
    try:
        stored = path.read_bytes()
        data = gzip.decompress(stored) if stored[:2] == b"\x1f\x8b" else stored
    except OSError as error:  # gzip's errors are OSErrors too
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from None
    except (EOFError, zlib.error) as error:
        raise DataError(f"{path}: the gzip file is damaged ({error}); fetch or write it again") from None
    return _parse(path, data, sha256(stored).hexdigest(), settled)


def _parse(path: Path, data: bytes, digest: str, format: TableFormat) -> Table:
    data = _as_utf8(path, data, format)
    if not data.strip():
        raise DataError(f"{path}: the file is empty")
    assert format.separator is not None
    separator = format.separator
    if len(separator.encode()) > 1:
        separator = _UNIT
        data = data.replace(format.separator.encode(), _UNIT.encode())
    plain = TableFormat(format.format, separator, format.header, "utf-8", format.quotes)
    header = next(_records(path, data, plain))[1]
    columns = dict.fromkeys((f"column_{i + 1}" for i in range(len(header))), pl.String())
    frame = _fast(data, plain, columns)
    if frame is None or _looks_ragged(data, plain, frame):
        _refuse_ragged(path, data, plain, len(header))
    if frame is None or data[:1] in (b"\n", b"\r") or frame[:, 0].has_nulls():  # blank lines, say
        rows = [fields for _, fields in _records(path, data, plain)][int(format.header) :]
        frame = pl.DataFrame(rows, schema=columns, orient="row")
    if frame.height == 0:
        raise DataError(f"{path}: the file has a header but no rows")
    names = tuple(header) if format.header else ()
    if format.format == "inter":
        names = _untyped(path, names)
    return Table(path, frame, names, digest, data, plain)


def _as_utf8(path: Path, data: bytes, format: TableFormat) -> bytes:
    if format.encoding.lower().replace("_", "-") in ("utf-8", "utf8"):
        data = data.removeprefix(b"\xef\xbb\xbf")
        try:
            if not data.isascii():
                data.decode()
        except UnicodeDecodeError as error:
            line = data.count(b"\n", 0, error.start) + 1
            raise DataError(f"{path}, line {line}: not UTF-8 text; try dataset.encoding=latin-1") from None
        return data
    try:
        return data.decode(format.encoding).encode()
    except LookupError:
        raise ConfigError(f"dataset.encoding={format.encoding} is not an encoding; utf-8 or latin-1, say") from None
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path}, line {line}: not {format.encoding} text; try another dataset.encoding") from None


def _fast(data: bytes, format: TableFormat, columns: Mapping[str, pl.DataType]) -> pl.DataFrame | None:
    """The records as polars reads them, a blank line as a row of nulls; None where it would rather not."""
    try:
        return pl.read_csv(
            data,
            separator=format.separator or ",",
            has_header=False,
            skip_rows=int(format.header),
            infer_schema=False,
            quote_char='"' if format.quotes else None,
            schema=columns,
        )
    except pl.exceptions.PolarsError:
        return None


def _records(path: Path, data: bytes, format: TableFormat) -> Iterator[tuple[int, list[str]]]:
    """(1-based line on which the record ends, fields) of every line that is not blank, header included."""
    text = io.TextIOWrapper(io.BytesIO(data), encoding="utf-8", newline="\n")
    if format.quotes:
        reader = csv.reader(text, delimiter=format.separator or ",", strict=True)
        try:
            yield from ((reader.line_num, fields) for fields in reader if fields)
        except csv.Error as error:
            raise DataError(
                f"{path}, line {reader.line_num}: {error}; mend the line: a quote left open or closed too soon, or "
                "another dataset.separator"
            ) from None
        return
    for number, line in enumerate(text, start=1):
        stripped = line.removesuffix("\n").removesuffix("\r")
        if stripped:
            yield number, stripped.split(format.separator)


def _looks_ragged(data: bytes, format: TableFormat, frame: pl.DataFrame) -> bool:
    """Whether some record may be malformed: cheap, and never false when one is."""
    if format.quotes and b'"' in data:
        return True  # polars lets a quote that is not closed swallow lines; the csv module does not
    if frame[:, -1].has_nulls():
        return True  # a record that is too short ends in nulls; without one, a surplus shows in the count
    assert format.separator is not None
    return data.count(format.separator.encode()) != (frame.height + format.header) * (frame.width - 1)


def _refuse_ragged(path: Path, data: bytes, format: TableFormat, width: int) -> None:
    for line, fields in _records(path, data, format):
        if len(fields) != width:
            expected = "the header has" if format.header else "line 1 has"
            raise DataError(
                f"{path}, line {line}: {len(fields)} columns where {expected} {width}; "
                "mend or delete the line, or set dataset.separator"
            )


def _untyped(path: Path, names: tuple[str, ...]) -> tuple[str, ...]:
    for name in names:
        if ":" not in name:
            raise DataError(
                f"{path}, line 1: RecBole's header is name:type (user_id:token), found {name!r}; "
                "mend it or set dataset.format=tsv"
            )
    return tuple(name.split(":", 1)[0] for name in names)


def _read_parquet(path: Path, format: TableFormat) -> Table:
    check_fits(estimate_text(path) * 3, path)  # columns are stored packed
    try:
        frame = pl.read_parquet(path)
    except (pl.exceptions.PolarsError, OSError) as error:
        raise DataError(f"{path}: not a readable Parquet file ({str(error).splitlines()[0]})") from None
    if frame.height == 0:
        raise DataError(f"{path}: the file has no rows")
    return Table(path, frame, tuple(frame.columns), sha256(path.read_bytes()).hexdigest(), b"", format)
