"""Files in, Interactions out: what is read, in which order, and what a malformed file is told."""

from __future__ import annotations

import csv
import gzip
import io
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedrec.data import Interactions, load_dataset
from fedrec.data.load import defaults
from fedrec.data.memory import available_memory, check_fits, estimate_text
from fedrec.errors import ConfigError, DataError, FedrecError

GOOD = "user_id,item_id,rating,timestamp\nu1,a,3,10\nu2,b,4.5,11\n"

Row = tuple[str, str, float | None, int | None]


def read(path: Path, **options: Any) -> Interactions:
    return load_dataset({"name": "file", "path": str(path), **options})


def rows_of(data: Interactions) -> list[Row]:
    """The interactions as plain rows, in the order in which they are held."""
    ratings = [None] * len(data) if data.rating is None else data.rating.tolist()
    times = [None] * len(data) if data.timestamp is None else data.timestamp.tolist()
    return [
        (data.user_ids[u], data.item_ids[i], r, t)
        for u, i, r, t in zip(data.user.tolist(), data.item.tolist(), ratings, times, strict=True)
    ]


# ---------------------------------------------------------------- any table, any format

_TEXT_ID = st.text(st.characters(exclude_categories=("Cc", "Cs")), min_size=1, max_size=6)
_NUMBER_ID = st.integers(0, 2**63 - 1).map(str)
_FLOAT32 = st.floats(width=32, allow_nan=False, allow_infinity=False)
_INT64 = st.integers(-(2**63), 2**63 - 1)


@st.composite
def tables(draw: st.DrawFn) -> tuple[list[Row], str]:
    """Rows with distinct pairs, with or without ratings and times, and the kind of their ids."""
    kind = draw(st.sampled_from(["text", "integer"]))
    ids = _TEXT_ID if kind == "text" else _NUMBER_ID
    pairs = draw(st.lists(st.tuples(ids, ids), min_size=1, max_size=12, unique=True))
    rated, timed = draw(st.booleans()), draw(st.booleans())
    times = st.one_of(st.integers(0, 3), _INT64)  # small ones so that ties occur
    rows = [(user, item, draw(_FLOAT32) if rated else None, draw(times) if timed else None) for user, item in pairs]
    return rows, kind


def written(rows: list[Row], path: Path) -> Path:
    """The rows as a file of the kind that its name says; columns without values are left out."""
    names = ["user_id", "item_id", "rating", "timestamp"]
    types = {"user_id": pl.String, "item_id": pl.String, "rating": pl.Float32, "timestamp": pl.Int64}
    frame = pl.DataFrame(rows, schema=types, orient="row")
    frame = frame.select([name for name in names if not frame[name].has_nulls()])
    kind = path.name.removesuffix(".gz").rsplit(".", 1)[1]
    if kind == "parquet":
        frame.write_parquet(path)
        return path
    if kind == "inter":
        lines = ["\t".join(f"{name}:{'float' if name in names[2:] else 'token'}" for name in frame.columns)]
        text = "\n".join(lines + ["\t".join(map(str, row)) for row in frame.iter_rows()]) + "\n"
    else:
        text = frame.write_csv(separator="," if kind == "csv" else "\t")
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(table=tables(), ending=st.sampled_from(["csv", "tsv", "parquet", "inter", "csv.gz", "tsv.gz", "inter.gz"]))
def test_any_table_reads_back_identical_from_every_format(
    tmp_path: Path, table: tuple[list[Row], str], ending: str
) -> None:
    rows, kind = table
    data = read(written(rows, tmp_path / f"table.{ending}"), ids=kind)

    def rank(identifier: str) -> Any:
        return int(identifier) if kind == "integer" else identifier

    assert list(data.user_ids) == sorted({row[0] for row in rows}, key=rank)
    assert list(data.item_ids) == sorted({row[1] for row in rows}, key=rank)
    expected = sorted(rows, key=lambda row: (rank(row[0]), row[3] if row[3] is not None else 0))  # stable: row order
    assert rows_of(data) == expected


def test_codes_do_not_depend_on_the_order_of_rows(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("user_id,item_id\n10,x\n9,y\n9,x\n")
    (tmp_path / "b.csv").write_text("user_id,item_id\n9,x\n9,y\n10,x\n")
    for name in ("a.csv", "b.csv"):
        assert list(read(tmp_path / name).user_ids) == ["9", "10"]  # numbers in numeric order, not as text


def test_ids_that_are_not_all_numbers_are_ordered_as_text(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("user_id,item_id\n10,007\n9,7\nx,-1\n")
    data = read(tmp_path / "a.csv")
    assert list(data.user_ids) == ["10", "9", "x"]
    assert list(data.item_ids) == ["-1", "007", "7"]  # 007 and 7 are two ids


def test_equal_times_keep_the_order_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("user_id,item_id,timestamp\n1,5,7\n1,3,7\n1,9,7\n1,4,6\n")
    data = read(tmp_path / "a.csv")
    assert [data.item_ids[i] for i in data.item] == ["4", "5", "3", "9"]


@pytest.mark.parametrize("time", ["881250949", "881250949.0", "881250949.", "8.81250949e8"])
def test_whole_timestamps_may_be_written_as_floats(tmp_path: Path, time: str) -> None:
    (tmp_path / "a.csv").write_text(f"user_id,item_id,timestamp\n1,2,{time}\n")
    data = read(tmp_path / "a.csv")
    assert data.timestamp is not None
    assert data.timestamp.tolist() == [881250949]


def test_parquet_dates_become_unix_seconds_and_whole_float_ids_numbers(tmp_path: Path) -> None:
    time = pl.Series(["2014-07-23T00:00:01"]).str.to_datetime()
    pl.DataFrame({"user_id": [3.0], "item_id": [12], "timestamp": time}).write_parquet(tmp_path / "a.parquet")
    data = read(tmp_path / "a.parquet")
    assert rows_of(data) == [("3", "12", None, 1406073601)]


def test_blank_lines_windows_line_ends_and_a_byte_order_mark_are_no_rows(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b"\xef\xbb\xbf\r\nuser_id,item_id\r\n\r\n1,2\r\n\r\n3,4\r\n\r\n\r\n")
    assert rows_of(read(tmp_path / "a.csv")) == [("1", "2", None, None), ("3", "4", None, None)]


def test_columns_can_be_named_or_numbered_and_left_out(tmp_path: Path) -> None:
    (tmp_path / "a.dat").write_text("x::7::5::1\ny::8::4::2\n")
    data = read(tmp_path / "a.dat", separator="::", header=False, columns={"user": 1, "item": 2, "timestamp": 4})
    assert rows_of(data) == [("x", "7", None, 1), ("y", "8", None, 2)]
    (tmp_path / "b.csv").write_text("who;what;rating\nx;7;not a number\n")
    data = read(tmp_path / "b.csv", separator=";", columns={"user": "who", "item": "what", "rating": False})
    assert rows_of(data) == [("x", "7", None, None)]


# ---------------------------------------------------------------- what a malformed file is told


@pytest.mark.parametrize(
    ("content", "options", "parts"),
    [
        ("", {}, ["the file is empty"]),
        ("\n\n", {}, ["the file is empty"]),
        ("user_id,item_id\n", {}, ["no rows"]),
        (GOOD + "u3,c,5\n", {}, ["line 4", "3 columns where the header has 4"]),
        (GOOD + "u3,c,5,6,7\n", {}, ["line 4", "5 columns"]),
        (GOOD + "u3,c\nu3,c,5,6,7,8\n", {}, ["line 4", "2 columns"]),  # a surplus elsewhere does not hide a lack
        (GOOD + "u3,c,5\nu4,d,5,6,", {"columns": {"timestamp": False}}, ["line 4", "3 columns"]),  # nor one beside it
        ('user_id,item_id\n1,"x"1"', {}, ["line 2", "mend the line", "quote"]),
        ('user_id,item_id\n1,"\n2,y\n""', {}, ["line 4", "unexpected end of data"]),
        (GOOD + '"u,3",c,5\n', {}, ["line 4", "3 columns"]),
        (GOOD + 'u3,"c,5,6\n', {}, ["quote"]),
        (GOOD + "\n\nu3,c,five,6\n", {}, ["line 6", "rating 'five'", "dataset.columns.rating=false"]),
        (GOOD + "u3,c,nan,6\n", {}, ["line 4", "rating 'nan'", "not a finite number"]),
        (GOOD + "u3,c,-inf,6\n", {}, ["line 4", "rating '-inf'"]),
        (GOOD + "u3,c,1e39,6\n", {}, ["line 4", "rating '1e39'"]),
        (GOOD + "u3,c,,6\n", {}, ["line 4", "rating (nothing)"]),
        (GOOD + "u3,c,5,noon\n", {}, ["line 4", "timestamp 'noon'", "dataset.columns.timestamp=false"]),
        (GOOD + "u3,c,5,6.5\n", {}, ["line 4", "timestamp '6.5'"]),
        (GOOD + "u3,c,5,9223372036854775808\n", {}, ["line 4", "timestamp '9223372036854775808'", "64 bits"]),
        (GOOD + "u3,c,5,nan\n", {}, ["line 4", "timestamp 'nan'"]),
        (GOOD + "u3,c,5,\n", {}, ["line 4", "timestamp (nothing)"]),
        (GOOD + ",c,5,6\n", {}, ["line 4", "no user id"]),
        (GOOD + 'u3,"",5,6\n', {}, ["line 4", "no item id"]),
        (GOOD + ",,,\n", {}, ["line 4", "no user id"]),
        (GOOD + "u1,a,2,12\n", {}, ["line 4", "user u1, item a", "line 2", "dataset.duplicates=last"]),
        (
            GOOD.replace("item_id", "item"),
            {},
            ["no column 'item_id'", "'user_id', 'item', 'rating', 'timestamp'", "=item"],
        ),
        (GOOD, {"columns": {"user": 5}}, ["dataset.columns.user=5", "from 1 to 4"]),
        (GOOD, {"header": False}, ["without a header", "1 to 4"]),
        (GOOD, {"ids": "integer"}, ["line 2", "user id 'u1' is not a whole number", "dataset.ids=text"]),
        ("user_id,item_id,item_id\n1,2,3\n", {}, ["two columns", "'item_id'"]),
        ("user_id,item_id\n1,2\n-3,4\n", {}, ["line 3", "user id -3 is negative", "dataset.ids=text"]),
        ("user_id,item_id\n1,2\n3,99999999999999999999\n", {}, ["line 3", "item id 9999", "beyond 64 bits"]),
        (GOOD, {"format": "inter"}, ["user_id:token", "dataset.format=tsv"]),
    ],
)
def test_malformed_file_is_refused_with_line_and_remedy(
    tmp_path: Path, content: str, options: dict[str, Any], parts: list[str]
) -> None:
    path = tmp_path / "ratings.csv"
    path.write_text(content)
    with pytest.raises(DataError) as refusal:
        read(path, **options)
    message = str(refusal.value)
    assert str(path) in message
    for part in parts:
        assert part in message
    assert list(tmp_path.iterdir()) == [path]


_PIECES = st.sampled_from(
    [
        b"user_id",
        b"item_id:token",
        b"1",
        b"-7",
        b"x",
        b"nan",
        b"1e400",
        b",",
        b"\t",
        b"\n",
        b"\r",
        b'"',
        b"\x00",
        b"\xff",
        b" ",
    ]
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    start=st.sampled_from([b"", GOOD.encode(), b"user_id:token\titem_id:token\n1\t2\n", b"\x1f\x8b\x08", b"PAR1"]),
    rest=st.lists(st.one_of(_PIECES, st.binary(max_size=4)), max_size=25).map(b"".join),
    ending=st.sampled_from(["csv", "tsv", "inter", "parquet", "csv.gz"]),
    header=st.booleans(),
)
def test_no_bytes_at_all_end_in_anything_but_data_or_a_clear_error(
    tmp_path: Path, start: bytes, rest: bytes, ending: str, header: bool
) -> None:
    path = tmp_path / f"bytes.{ending}"
    path.write_bytes(start + rest)
    columns = {} if header else {"columns": {"user": 1, "item": 2, "rating": 3}}
    message = ""
    try:
        data = read(path, header=header, **columns)
    except FedrecError as refusal:
        message = str(refusal)
    assert len(data) > 0 if not message else str(path) in message
    assert "\n" not in message


_CSV_PIECES = ["1", "x", ",", ",", '"', '""', '"a,b"', "\n", "\n", " ", "\r\n", "é", "'"]


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.lists(st.sampled_from(_CSV_PIECES), max_size=14).map("".join))
def test_csv_is_read_as_pythons_csv_module_reads_it_or_refused(tmp_path: Path, text: str) -> None:
    content = "user_id,item_id\n" + text
    path = tmp_path / "a.csv"
    path.write_text(content, newline="")
    try:
        records = [tuple(fields) for fields in csv.reader(io.StringIO(content, newline=""), strict=True) if fields][1:]
    except csv.Error:
        records = []
    sound = bool(records) and all(len(fields) == 2 and all(fields) for fields in records)
    if not sound:
        with pytest.raises(DataError):
            read(path, ids="text", duplicates="first")
        return
    data = read(path, ids="text", duplicates="first")
    assert {row[:2] for row in rows_of(data)} == set(records)


def test_line_numbers_count_the_lines_inside_quoted_fields(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('user_id,item_id,rating\n1,"two\nlines",3\n1,b,x\n')
    with pytest.raises(DataError, match=r"line 4: rating 'x'"):
        read(tmp_path / "a.csv")


def test_latin1_text_is_refused_as_utf8_with_its_line_and_read_when_said(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes("user_id,item_id\n1,a\n2,caf\xe9\n".encode("latin-1"))
    with pytest.raises(DataError, match=r"line 3: not UTF-8 text; try dataset.encoding=latin-1"):
        read(tmp_path / "a.csv")
    assert list(read(tmp_path / "a.csv", encoding="latin-1").item_ids) == ["a", "café"]


def test_damaged_gzip_missing_file_folder_and_false_parquet_are_refused(tmp_path: Path) -> None:
    (tmp_path / "cut.csv.gz").write_bytes(gzip.compress(GOOD.encode())[:-9])
    with pytest.raises(DataError, match=r"cut\.csv\.gz: .*damaged"):
        read(tmp_path / "cut.csv.gz")
    with pytest.raises(DataError, match=r"cut\.csv: no such file; did you mean cut\.csv\.gz\?"):
        read(tmp_path / "cut.csv")
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(DataError, match="is a folder"):
        read(tmp_path / "folder.csv")
    (tmp_path / "a.parquet").write_text(GOOD)
    with pytest.raises(DataError, match="not a readable Parquet file"):
        read(tmp_path / "a.parquet")


def test_parquet_errors_count_rows(tmp_path: Path) -> None:
    pl.DataFrame({"user_id": [1, 2], "item_id": [1, None]}).write_parquet(tmp_path / "a.parquet")
    with pytest.raises(DataError, match="row 2: no item id"):
        read(tmp_path / "a.parquet")
    pl.DataFrame({"user_id": [1], "item_id": [1], "rating": [math.nan]}).write_parquet(tmp_path / "b.parquet")
    with pytest.raises(DataError, match="row 1: rating nan"):
        read(tmp_path / "b.parquet")
    pl.DataFrame({"user_id": [[1]], "item_id": [1]}).write_parquet(tmp_path / "c.parquet")
    with pytest.raises(DataError, match="column 'user_id' holds List"):
        read(tmp_path / "c.parquet")


@pytest.mark.parametrize(("rule", "rating"), [("first", 1.0), ("last", 5.0)])
def test_duplicates_can_be_settled_by_a_rule_and_are_noted(tmp_path: Path, rule: str, rating: float) -> None:
    (tmp_path / "a.csv").write_text("user_id,item_id,rating,timestamp\n1,2,1,30\n1,3,2,20\n1,2,5,10\n")
    data = read(tmp_path / "a.csv", duplicates=rule)
    assert {row[1]: row[2] for row in rows_of(data)} == {"2": rating, "3": 2.0}
    assert data.notes == (f"1 repeated (user, item) rows dropped, the {rule} of each pair kept",)


# ---------------------------------------------------------------- configuration


@pytest.mark.parametrize(
    ("config", "parts"),
    [
        ({"name": "file", "paht": "x"}, ["dataset.paht", "did you mean path?"]),
        ({"name": "file", "path": "a.csv", "columns": {"usr": 1}}, ["dataset.columns.usr", "did you mean user?"]),
        ({"name": "file", "path": None}, ["dataset.path=None", "dataset.path=ratings.csv"]),
        ({"name": "file", "path": "a.csv", "columns": "user"}, ["dataset.columns='user'", "user, item"]),
        ({"name": "file", "path": "a.csv", "columns": {"user": 0}}, ["dataset.columns.user=0", "number from 1"]),
        ({"name": "file", "path": "a.csv", "header": "yes"}, ["dataset.header='yes'", "true or false"]),
        ({"name": "file", "path": "a.csv", "duplicates": "lats"}, ["dataset.duplicates=lats", "error, first, last"]),
        ({"name": "file", "path": "a.csv", "ids": "str"}, ["dataset.ids=str", "auto, integer, text"]),
        ({"name": "file", "path": "a.csv", "format": "excel"}, ["dataset.format=excel", "csv, tsv, inter, parquet"]),
        ({"name": "file", "path": "a.csv", "encoding": "utf-9"}, ["dataset.encoding=utf-9"]),
        ({"name": "file", "path": "a.csv", "min_rating": 3}, ["dataset.min_rating=3", "no ratings"]),
        ({"name": "file", "path": "a.csv", "filter": "twice"}, ["dataset.filter=twice", "iterative, once"]),
        ({"name": "file", "path": "a.csv", "min_user_interactions": -1}, ["min_user_interactions=-1", "whole number"]),
        ({"name": "file", "path": "a.what"}, ["a.what", "set dataset.format to csv, tsv, inter or parquet"]),
        ({"name": "given", "train": "a.csv", "min_user_interactions": 5}, ["dataset.min_user_interactions"]),
        ({"name": "ml-100K"}, ["dataset.name=ml-100K", "did you mean ml-100k?"]),
        ({"name": "a.csv"}, ["dataset.name=a.csv", "ml-1m"]),
        ({"path": "a.csv"}, ["dataset.name is missing"]),
        ({"name": "ml-100k", "path": "a.csv"}, ["dataset.path"]),
    ],
)
def test_wrong_configuration_names_key_and_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: dict[str, Any], parts: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.csv").write_text("user_id,item_id\n1,é\n")
    (tmp_path / "a.what").write_text("user_id,item_id\n1,2\n")
    with pytest.raises(ConfigError) as refusal:
        load_dataset(config)
    for part in parts:
        assert part in str(refusal.value)


@pytest.mark.parametrize("name", ["ml-100k", "ml-1m", "ml-latest-small", "amazon-instant-video", "file", "given"])
def test_dataset_configs_show_every_key_with_its_default(name: str) -> None:
    config = Path(__file__).parents[2] / "configs" / "dataset" / f"{name}.yaml"
    assert yaml.safe_load(config.read_text()) == defaults(name)


def test_hydra_containers_are_taken_as_they_are(tmp_path: Path) -> None:
    from omegaconf import OmegaConf

    (tmp_path / "a.csv").write_text(GOOD)
    config = OmegaConf.load(Path(__file__).parents[2] / "configs" / "dataset" / "file.yaml")
    config.path = str(tmp_path / "a.csv")
    assert rows_of(load_dataset(config)) == [("u1", "a", 3.0, 10), ("u2", "b", 4.5, 11)]


# ---------------------------------------------------------------- given splits


def given_split(folder: Path, train: str, validation: str, test: str, **options: Any) -> Interactions:
    paths = {}
    for fold, text in (("train", train), ("validation", validation), ("test", test)):
        paths[fold] = str(folder / f"{fold}.csv")
        Path(paths[fold]).write_text("user_id,item_id,timestamp\n" + text)
    return load_dataset({"name": "given", **paths, **options})


def test_given_files_become_folds_of_one_data_set(tmp_path: Path) -> None:
    data = given_split(tmp_path, "1,a,1\n1,b,5\n2,a,1\n2,c,2\n", "1,c,3\n", "2,b,9\n")
    assert data.fold is not None
    assert [(row[0], row[1], fold) for row, fold in zip(rows_of(data), data.fold.tolist(), strict=True)] == [
        ("1", "a", 0),
        ("1", "c", 1),
        ("1", "b", 0),
        ("2", "a", 0),
        ("2", "c", 0),
        ("2", "b", 2),
    ]
    assert len(data.sha256) == 64


def test_given_test_file_with_unknown_item_user_or_training_pair_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"test\.csv, line 3: item z is not in the training file .*dataset\.unknown=drop"
    ):
        given_split(tmp_path, "1,a,1\n1,b,2\n2,c,1\n", "2,b,3\n", "2,a,5\n1,z,4\n")
    with pytest.raises(DataError, match=r"validation\.csv, line 2: user 9 is not in the training file"):
        given_split(tmp_path, "1,a,1\n1,b,2\n2,c,1\n", "9,b,3\n", "1,c,4\n")
    with pytest.raises(
        DataError, match=r"test\.csv, line 2: user 1, item a occurs again \(first: .*train\.csv, line 2\)"
    ):
        given_split(tmp_path, "1,a,1\n2,b,2\n", "1,b,3\n", "1,a,4\n")
    data = given_split(tmp_path, "1,a,1\n2,b,2\n", "1,b,3\n9,a,1\n", "2,z,4\n", unknown="drop")
    assert len(data) == 3
    assert data.notes == ("2 held-out rows dropped: their user or item is not in the training file",)


# ---------------------------------------------------------------- side tables


def test_items_and_users_get_their_tables_in_code_order(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("user_id,item_id\n2,30\n1,4\n1,5\n")
    (tmp_path / "items.csv").write_text(
        'item_id,name,kinds\n30,"Big, The (1999-2001)",A|B\n4,No Year,(no genres listed)\n99,Never seen (1990),A\n'
    )
    (tmp_path / "users.tsv").write_text("id\tsex\tyears\n1\tF\t33\n")
    data = read(
        tmp_path / "a.csv",
        items={"path": str(tmp_path / "items.csv"), "columns": {"title": "name", "genres": "kinds"}},
        users={"path": str(tmp_path / "users.tsv"), "columns": {"id": "id", "gender": "sex", "age": "years"}},
    )
    assert data.item_table is not None
    assert data.item_table.select("title", "genres", "year").rows() == [
        ("No Year", [], None),
        (None, [], None),
        ("Big, The", ["A", "B"], 1999),
    ]
    assert data.user_table is not None
    assert data.user_table.rows() == [("F", 33), (None, None)]


def test_item_listed_twice_and_missing_side_column_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("user_id,item_id\n1,4\n")
    (tmp_path / "items.csv").write_text("item_id,title\n4,x\n5,z\n4,y\n")
    with pytest.raises(DataError, match=r"items\.csv, line 4: item 4 is listed again"):
        read(tmp_path / "a.csv", items={"path": str(tmp_path / "items.csv"), "columns": {"title": "title"}})
    with pytest.raises(DataError, match=r"no column 'titel'.*dataset\.items\.columns\.title=title"):
        read(tmp_path / "a.csv", items={"path": str(tmp_path / "items.csv"), "columns": {"title": "titel"}})


# ---------------------------------------------------------------- filters


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    pairs=st.sets(st.tuples(st.integers(0, 7), st.integers(0, 7)), min_size=1, max_size=40),
    users=st.integers(0, 4),
    items=st.integers(0, 4),
)
def test_iterative_filter_leaves_the_largest_core(
    tmp_path: Path, pairs: set[tuple[int, int]], users: int, items: int
) -> None:
    path = tmp_path / "a.csv"
    path.write_text("user_id,item_id\n" + "".join(f"{u},{i}\n" for u, i in sorted(pairs)))
    core = set(pairs)
    while True:  # one removal at a time: the core does not depend on the order of removals
        weak_users = [u for u in {u for u, _ in core} if sum(p[0] == u for p in core) < users]
        weak_items = [i for i in {i for _, i in core} if sum(p[1] == i for p in core) < items]
        if weak_users:
            core = {p for p in core if p[0] != weak_users[0]}
        elif weak_items:
            core = {p for p in core if p[1] != weak_items[0]}
        else:
            break
    thresholds = {"min_user_interactions": users, "min_item_interactions": items}
    if not core:
        with pytest.raises(DataError, match="minimum-interaction filters"):
            read(path, **thresholds)
        return
    data = read(path, **thresholds)
    assert {(int(row[0]), int(row[1])) for row in rows_of(data)} == core
    assert set(data.user_ids) == {str(u) for u, _ in core}


def test_filter_once_stops_after_one_pass_and_side_tables_follow(tmp_path: Path) -> None:
    # item z falls below 2 once user 3 has gone; that leaves user 2 with one interaction
    (tmp_path / "a.csv").write_text("user_id,item_id,rating\n1,x,5\n1,y,5\n2,x,5\n2,z,5\n3,z,5\n4,x,5\n4,y,1\n4,q,5\n")
    (tmp_path / "i.csv").write_text("item_id,title\nx,X\ny,Y\nz,Z\nq,Q\n")
    items = {"path": str(tmp_path / "i.csv"), "columns": {"title": "title"}}
    options = {"min_user_interactions": 2, "min_item_interactions": 2, "items": items}
    once = read(tmp_path / "a.csv", filter="once", **options)
    assert [row[:2] for row in rows_of(once)] == [("1", "x"), ("1", "y"), ("2", "x"), ("4", "x"), ("4", "y")]
    core = read(tmp_path / "a.csv", **options)
    assert [row[:2] for row in rows_of(core)] == [("1", "x"), ("1", "y"), ("4", "x"), ("4", "y")]
    assert core.item_table is not None
    assert core.item_table["title"].to_list() == ["X", "Y"]
    rated = read(tmp_path / "a.csv", min_rating=2)
    assert ("4", "y", 1.0, None) not in rows_of(rated)
    assert len(rated) == 7


# ---------------------------------------------------------------- memory


def test_file_beyond_the_memory_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "huge.csv"
    path.write_text(GOOD * 2000)
    os.truncate(path, 2**41)  # a sparse file of 2 TiB
    with pytest.raises(
        DataError, match=r"huge\.csv: reading it needs about [0-9,.]+ GB of memory and [0-9,.]+ GB are free"
    ):
        read(path)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak is read from Linux' /proc")
def test_estimate_covers_what_reading_a_text_file_takes(tmp_path: Path) -> None:
    import subprocess
    import sys

    n = 400_000
    index = np.arange(n)
    frame = pl.DataFrame(
        {"user_id": index // 100, "item_id": index * 7919 % 10007, "rating": index % 5, "timestamp": index}
    )
    frame.write_csv(tmp_path / "a.csv")
    code = (
        "import re, sys; from fedrec.data import load_dataset\n"
        "def peak(): return 1024 * int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1])\n"
        "load_dataset({'name': 'file', 'path': sys.argv[1]}); before = peak()\n"
        "data = load_dataset({'name': 'file', 'path': sys.argv[2]}); print(peak() - before)"
    )
    (tmp_path / "small.csv").write_text(GOOD)
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "small.csv"), str(tmp_path / "a.csv")],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
    )
    used, estimate = int(done.stdout), estimate_text(tmp_path / "a.csv")
    assert used <= estimate <= 4 * used


def test_small_work_fits() -> None:
    assert available_memory() > 2**20
    check_fits(2**20, "a megabyte")


def test_synthetic_comes_through_the_same_door_with_filters_and_named_keys() -> None:
    data = load_dataset("synthetic", users=60, items=50, seed=1)
    assert (data.n_users, data.name) == (60, "synthetic")
    popular = load_dataset({"name": "synthetic", "users": 60, "items": 50, "seed": 1, "min_item_interactions": 20})
    assert 0 < popular.n_items < data.n_items
    assert np.bincount(popular.item).min() >= 20
    with pytest.raises(ConfigError, match=r"dataset\.usres"):
        load_dataset("synthetic", usres=60)
