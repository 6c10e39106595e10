"""The catalogue's entries. Nothing of these data ships with fedrec; every licence stays with its publisher."""

from __future__ import annotations

from pathlib import Path

from fedrec.data.catalogue import Entry, Statistics
from fedrec.data.download import Archive, Wheel
from fedrec.data.features import ItemSource, UserSource
from fedrec.data.readers import Columns, InteractionSource
from fedrec.data.tables import TableFormat

_GROUPLENS = (
    "GroupLens: research use with acknowledgement (Harper and Konstan 2015, doi:10.1145/2827872); no commercial use, "
    "no redistribution without permission"
)
_GROUPLENS_LATEST = (
    "GroupLens: research use with acknowledgement (Harper and Konstan 2015, doi:10.1145/2827872); no commercial use, "
    "redistribution under the same terms"
)
_FILES = "https://files.grouplens.org/datasets/movielens"
_TABS = TableFormat("tsv", header=False, quotes=False)
_COLONS = TableFormat("csv", separator="::", header=False, encoding="latin-1")
_FOUR = Columns(1, 2, 3, 4)

_GENRES_100K = (
    "unknown",
    "Action",
    "Adventure",
    "Animation",
    "Children's",
    "Comedy",
    "Crime",
    "Documentary",
    "Drama",
    "Fantasy",
    "Film-Noir",
    "Horror",
    "Musical",
    "Mystery",
    "Romance",
    "Sci-Fi",
    "Thriller",
    "War",
    "Western",
)
_OCCUPATIONS_1M = (
    "other or not specified",
    "academic/educator",
    "artist",
    "clerical/admin",
    "college/grad student",
    "customer service",
    "doctor/health care",
    "executive/managerial",
    "farmer",
    "homemaker",
    "K-12 student",
    "lawyer",
    "programmer",
    "retired",
    "sales/marketing",
    "scientist",
    "self-employed",
    "technician/engineer",
    "tradesman/craftsman",
    "unemployed",
    "writer",
)

_ML_100K = Entry(
    name="ml-100k",
    title="MovieLens 100K",
    licence=_GROUPLENS,
    homepage="https://grouplens.org/datasets/movielens/100k/",
    versions=(Statistics(943, 1_682, 100_000),),
    forms=(
        InteractionSource(
            paths=(Path("u.data"),),
            format=_TABS,
            columns=_FOUR,
            ids="integer",
            items=ItemSource(
                Path("u.item"),
                TableFormat("csv", separator="|", header=False, encoding="latin-1", quotes=False),
                id=1,
                title=2,
                genres=6,
                genre_flags=_GENRES_100K,
            ),
            users=UserSource(
                Path("u.user"),
                TableFormat("csv", separator="|", header=False, quotes=False),
                id=1,
                age=2,
                gender=3,
                occupation=4,
            ),
        ),
        InteractionSource(
            paths=(Path("ml-100k.inter"),),
            ids="integer",
            items=ItemSource(
                Path("ml-100k.item"),
                title="movie_title",
                year="release_year",
                genres="class",
                genre_separator=" ",
                titles_mended={"unkonwn": "unknown"},
            ),
            users=UserSource(Path("ml-100k.user"), gender="gender", age="age", occupation="occupation"),
        ),
    ),
    sources=(
        Archive(
            url=f"{_FILES}/ml-100k.zip",
            checksum="md5:0e33842e24a9c977be4e0107933c0723",
            megabytes=4.9,
            members={f"ml-100k/{name}": name for name in ("u.data", "u.item", "u.user")},
        ),
        Wheel(
            requirement="recbole==1.2.1",
            members={
                f"recbole/dataset_example/ml-100k/{name}": name
                for name in ("ml-100k.inter", "ml-100k.item", "ml-100k.user")
            },
        ),
    ),
    checksums={
        "u.data": "06416e597f82b7342361e41163890c81036900f418ad91315590814211dca490",
        "u.item": "553841ebc7de3a0fd0d6b62a204ea30c1e651aacfb2814c7a6584ac52f2c5701",
        "u.user": "f120e114da2e8cf314fd28f99417c94ae9ddf1cb6db8ce0e4b5995d40e90e62c",
        "ml-100k.inter": "4edb74e2a81178c2ba9ff381495f754f996c4aea351b1272ca36b43da0935eff",
        "ml-100k.item": "51d7cdf777ce5c0f5b32c1d947a4a81fe07d75e78abbe761e0cd4d0756064532",
        "ml-100k.user": "4f670007d9cfbeb9807e757209af1555b9bcc186bde25e767f67cb67c6dd5972",
    },
    # Below its header line ml-100k.inter is u.data byte for byte, row order included, so u.data's digest names both.
    digest="06416e597f82b7342361e41163890c81036900f418ad91315590814211dca490",
)

_MOVIES_1M = ItemSource(Path("movies.dat"), _COLONS, id=1, title=2, genres=3)
_USERS_1M = UserSource(
    Path("users.dat"),
    _COLONS,
    id=1,
    gender=2,
    age=3,
    occupation=4,
    occupations={str(code): name for code, name in enumerate(_OCCUPATIONS_1M)},
)
_AGE_1M = "age is the lower end of a bracket; 1 stands for under 18"
_ML_1M = Entry(
    name="ml-1m",
    title="MovieLens 1M",
    licence=_GROUPLENS,
    homepage="https://grouplens.org/datasets/movielens/1m/",
    versions=(Statistics(6_040, 3_706, 1_000_209),),
    forms=(
        InteractionSource(
            paths=(Path("ratings.dat"),),
            format=_COLONS,
            columns=_FOUR,
            ids="integer",
            items=_MOVIES_1M,
            users=_USERS_1M,
            notes=(_AGE_1M,),
        ),
        InteractionSource(
            paths=(Path("ml-1m.inter.gz"),),
            ids="integer",
            items=_MOVIES_1M,
            users=_USERS_1M,
            notes=("timestamps are positions in each user's history, not clock times; there are no ratings", _AGE_1M),
        ),
    ),
    sources=(
        Archive(
            url=f"{_FILES}/ml-1m.zip",
            checksum="md5:c4d9eecfca2ab87c1945afe126590906",
            megabytes=5.9,
            members={f"ml-1m/{name}": name for name in ("ratings.dat", "movies.dat", "users.dat")},
        ),
    ),
)

_ML_LATEST_SMALL = Entry(
    name="ml-latest-small",
    title="MovieLens latest, small",
    licence=_GROUPLENS_LATEST,
    homepage="https://grouplens.org/datasets/movielens/latest/",
    versions=(
        Statistics(671, 9_066, 100_004, "October 2016"),
        Statistics(610, 9_724, 100_836, "September 2018"),
    ),
    forms=(
        InteractionSource(
            paths=(Path("ratings.csv"),),
            columns=Columns("userId", "movieId", "rating", "timestamp"),
            ids="integer",
            items=ItemSource(Path("movies.csv"), id="movieId", title="title", genres="genres"),
        ),
    ),
    sources=(
        Archive(
            url=f"{_FILES}/ml-latest-small.zip",
            checksum=None,  # replaced at times, so there is no lasting checksum; the size tells the version
            megabytes=1.0,
            members={f"ml-latest-small/{name}": name for name in ("ratings.csv", "movies.csv")},
        ),
    ),
    moving=True,
)

_AMAZON = Entry(
    name="amazon-instant-video",
    title="Amazon Instant Video",
    licence="no licence stated at its source",
    homepage="https://github.com/mtics/FedRAP",
    versions=(Statistics(8_072, 11_830, 63_836),),
    forms=(InteractionSource(paths=(Path("ratings.dat"),), format=TableFormat("csv", header=False), columns=_FOUR),),
)

ENTRIES = (_ML_100K, _ML_1M, _ML_LATEST_SMALL, _AMAZON)
