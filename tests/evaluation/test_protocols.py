"""Protocols: read from configuration strictly, labelled for what they are, and cut as they say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

import configs
from fedrec.data.interactions import Interactions
from fedrec.errors import ConfigError
from fedrec.evaluation.protocols import Protocol, make_split

NAMES = ("clean", "paper", "temporal", "random", "given")


def shipped(name: str) -> DictConfig:
    folder = str(Path(next(iter(configs.__path__))).resolve())
    with initialize_config_dir(folder, version_base=None):
        node: DictConfig = compose(f"protocol/{name}").protocol
        return node


@pytest.fixture
def data() -> Interactions:
    user = np.repeat(np.arange(20), 10)
    item = np.tile(np.arange(10), 20)
    time = np.tile([0, 1, 2, 3, 4, 5, 6, 7, 9, 9], 20)
    fold = np.tile([0, 0, 0, 0, 0, 0, 0, 1, 2, 2], 20)
    return Interactions(
        name="sample",
        user=user.astype(np.int32),
        item=item.astype(np.int32),
        user_ids=[str(u) for u in range(20)],
        item_ids=[str(i) for i in range(10)],
        timestamp=time.astype(np.int64),
        fold=fold.astype(np.int8),
    )


@pytest.mark.parametrize("name", NAMES)
def test_every_shipped_protocol_names_every_setting_and_splits(name: str, data: Interactions) -> None:
    config = shipped(name)
    assert set(config) == set(Protocol.__dataclass_fields__)
    protocol = Protocol.from_config(config)
    assert protocol.name == name
    assert protocol == Protocol.from_config(OmegaConf.to_container(config))  # type: ignore[arg-type]
    split = make_split(data, protocol, 0)
    sizes = {"clean": 1, "paper": 1, "temporal": 2, "random": 1, "given": 2}
    assert split.test.counts.tolist() == [sizes[name]] * 20


def test_clean_is_the_default_and_has_no_caveat() -> None:
    assert Protocol.from_config(shipped("clean")) == Protocol()
    assert Protocol().caveats() == ()
    assert not Protocol().leaky


def test_paper_is_labelled_leaky_chosen_on_test_and_sampled(data: Interactions) -> None:
    paper = Protocol.from_config(shipped("paper"))
    assert paper.leaky
    text = " ".join(paper.caveats())
    assert "Leaky" in text
    assert "chosen on the test set" in text
    assert "99 sampled negatives" in text
    split = make_split(data, paper, 0)
    assert split.test.items.tolist() == [8] * 20  # the first of the two tied rows, rank 1 of rank(method="first")
    assert split.validation.items.tolist() == [9] * 20
    assert split.negatives_exclude.row(0).tolist() == list(range(10))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"tie": "file"}, r"protocol\.tie is unknown; did you mean protocol\.ties\?"),
        ({"qqq": 1}, r"protocol\.qqq is unknown; known keys: name, split"),
        ({"split": "loo"}, r"protocol\.split='loo' is unknown; write one of leave_one_out, temporal"),
        ({"ties": "last"}, r"protocol\.ties='last' is unknown; write one of file, first_row, random"),
        ({"ks": 10}, r"protocol\.ks=10 must be a list"),
        ({"ks": [10, 0]}, r"protocol\.ks=\[10, 0\] must be different positive"),
        ({"ks": [10, "x"]}, r"protocol\.ks='x' must be a whole number"),
        ({"sampled_negatives": 9.5}, r"protocol\.sampled_negatives=9\.5 must be a whole number"),
        ({"share_sampled_negatives": 1}, r"protocol\.share_sampled_negatives=1 must be true or false"),
        ({"select_metric": "hr@7"}, r"protocol\.select_metric='hr@7' is not computed; write one of hr@5"),
        ({"tie_draws": 3}, r"protocol\.tie_draws=3 repeats over random tie orders"),
        ({"tie_draws": 0}, r"protocol\.tie_draws=0 must be at least 1"),
        ({"ranking": "sampled", "sampled_negatives": 0}, r"protocol\.ranking=sampled needs"),
    ],
)
def test_a_wrong_setting_is_named_with_what_to_write(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Protocol.from_config(config)


def test_tie_variants_are_one_protocol_per_tie_seed_with_different_test_items(data: Interactions) -> None:
    protocol = Protocol(ties="random", tie_seed=5, tie_draws=3)
    variants = protocol.tie_variants()
    assert [v.tie_seed for v in variants] == [5, 6, 7]
    assert all(v.tie_draws == 1 for v in variants)
    tested = {tuple(make_split(data, v, 0).test.items.tolist()) for v in variants}
    assert len(tested) == 3


def test_the_runs_seed_moves_the_random_split_only(data: Interactions) -> None:
    for protocol, moves in ((Protocol(split="random"), True), (Protocol(ties="random"), False)):
        one, two = (make_split(data, protocol, seed).test.items for seed in (1, 2))
        assert (one != two).any() == moves
