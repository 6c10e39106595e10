"""Re-ranking by text vectors of titles and genres: on the device, without a network, the same on every machine.

The vectors are WordLlama's (D. L. Miller, "WordLlama: Recycled Token Embeddings from Large Language Models", 2024): a
text's vector is the mean of its tokens' 256-dimensional vectors, read from the package's own files. The catalogue's
mean is taken off before the cosine, since what all texts have in common (brackets, "19", "Drama") tells no two apart;
on MovieLens-100K that is worth .03 of AUC.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import load_file

from fedrec.errors import ConfigError
from unlearning.rerankers.base import Answer, Catalogue, Question

Float32 = npt.NDArray[np.float32]
PACKAGE = "wordllama"
WEIGHTS = "weights/l2_supercat_256.safetensors"
TOKENIZER = "tokenizers/l2_supercat_tokenizer_config.json"


@dataclass(frozen=True)
class Sentences:
    """No settings: the score of a candidate is its mean cosine to the history's items."""

    def check(self, where: str) -> None:
        if _folder() is None or importlib.util.find_spec("tokenizers") is None:
            raise ConfigError(
                f"{where}.reranker=sentences needs the package {PACKAGE}, which carries the text vectors; "
                "pip install wordllama, or set reranker=chat"
            )

    def prepare(self, catalogue: Catalogue, seed: int, where: str) -> TextVectors:
        self.check(where)
        return TextVectors(vectors(sentences_of(catalogue)))


@dataclass(frozen=True)
class TextVectors:
    """A catalogue's unit vectors, float32[n_items, d]; a row of zeros for a text that says nothing."""

    unit: Float32

    @property
    def bytes_per_device(self) -> int:
        return self.unit.nbytes

    @property
    def notes(self) -> Sequence[str]:
        return (
            f"Candidates were re-ranked on the devices by the cosine of text vectors of titles and genres "
            f"({PACKAGE} {importlib.metadata.version(PACKAGE)}, {self.unit.shape[1]} dimensions).",
        )

    def rank(self, questions: Sequence[Question]) -> list[Answer]:
        return [Answer(self._similarity(question)) for question in questions]

    def _similarity(self, question: Question) -> npt.NDArray[np.float64]:
        # The mean of cosines is the cosine with the mean, up to a factor that all candidates share.
        taste = self.unit[question.history].mean(axis=0, dtype=np.float64)
        return np.asarray(self.unit[question.candidates].astype(np.float64) @ taste, dtype=np.float64)


def sentences_of(catalogue: Catalogue) -> tuple[str, ...]:
    """What is embedded of each item: "Title (year). Genre, genre"."""
    if catalogue.genres is None:
        return catalogue.texts
    pairs = zip(catalogue.texts, catalogue.genres, strict=True)
    return tuple(f"{text}. {', '.join(genres)}" if genres else text for text, genres in pairs)


@lru_cache(maxsize=4)
def vectors(texts: tuple[str, ...]) -> Float32:
    """float32[len(texts), d], read-only: centred on their mean, unit length. Kept in memory per catalogue."""
    raw = embed(texts)
    centred = raw - raw.mean(axis=0)
    norms = np.linalg.norm(centred, axis=1, keepdims=True)
    unit = np.where(norms > 1e-6, centred / np.maximum(norms, 1e-6), 0.0).astype(np.float32)
    unit.flags.writeable = False
    return unit


def embed(texts: Sequence[str]) -> Float32:
    """float32[len(texts), d]: the mean of every text's token vectors, zeros for a text without tokens.

    The package's files are read without importing it: its own loader looks for the tokenizer in a folder of another
    name, goes to the network when it is not there, and sets up logging for the whole program.
    """
    folder = _folder()
    if folder is None:
        raise ConfigError(f"the package {PACKAGE} is not installed; pip install wordllama")
    table = load_file(folder / WEIGHTS)["embedding.weight"]
    tokenizers: Any = importlib.import_module("tokenizers")
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / TOKENIZER))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    found = np.zeros((len(texts), table.shape[1]), dtype=np.float32)
    for row, encoding in enumerate(tokenizer.encode_batch(list(texts), add_special_tokens=False)):
        if encoding.ids:
            found[row] = table[encoding.ids].astype(np.float32).mean(axis=0)
    return found


def _folder() -> Path | None:
    """Where the package lies, if it does, and has its model."""
    found = importlib.util.find_spec(PACKAGE)
    if found is None or not found.submodule_search_locations:
        return None
    folder = Path(found.submodule_search_locations[0])
    return folder if (folder / WEIGHTS).is_file() and (folder / TOKENIZER).is_file() else None
