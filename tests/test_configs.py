"""Every shipped configuration composes, says what it is, and knows only settings that exist."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import yaml

from fedrec.algorithms import Problem, build
from fedrec.evaluation.protocols import Protocol
from fedrec.experiment.attacks import AttackSettings
from fedrec.experiment.config import GROUPS, expand_sweep, groups, load_config
from privacy.settings import PrivacySettings
from server.settings import EvaluationSettings, FederationSettings, RunnerSettings, from_config

CONFIGS = Path(__file__).parents[1] / "configs"
CHOICES = [(path.parent.name, path.stem) for path in sorted(CONFIGS.glob("*/*.yaml"))]


def test_every_folder_is_a_group_and_every_file_a_choice() -> None:
    assert {(group, choice) for group, choices in groups().items() for choice in choices} == set(CHOICES)
    assert {group for group, _ in CHOICES} == set(GROUPS)


@pytest.mark.parametrize(("group", "choice"), CHOICES, ids=[f"{group}={choice}" for group, choice in CHOICES])
def test_a_choice_composes_into_settings_that_their_rooms_accept(group: str, choice: str) -> None:
    config = load_config([f"{group}={choice}", f"runner.workers={os.cpu_count()}"])
    from_config(FederationSettings, "federation", config["federation"])
    from_config(EvaluationSettings, "evaluation", config["evaluation"])
    from_config(RunnerSettings, "runner", config["runner"])
    Protocol.from_config(config["protocol"])
    PrivacySettings.from_config({**config["privacy"], "epsilon": config["privacy"].get("epsilon") or 1.0})
    AttackSettings.from_config(config["attack"])
    if config["algorithm"]["_target_"]:
        build(config["algorithm"], Problem(4, 12, 0))


@pytest.mark.parametrize("recipe", sorted(path.stem for path in (CONFIGS / "experiment").glob("*.yaml")))
def test_a_recipe_is_named_as_its_file_and_says_what_it_is(recipe: str) -> None:
    assert load_config([f"experiment={recipe}"])["name"] == recipe
    comment = (CONFIGS / "experiment" / f"{recipe}.yaml").read_text().splitlines()[1]
    assert comment.startswith("# ")
    assert len(comment.split()) > 5


def test_files_set_only_keys_once() -> None:
    class Strict(yaml.SafeLoader):
        pass

    def mapping(loader: Strict, node: yaml.MappingNode) -> dict[object, object]:
        keys = [loader.construct_object(key) for key, _ in node.value]  # type: ignore[no-untyped-call]
        assert len(keys) == len(set(keys)), keys
        return {
            key: loader.construct_object(value, deep=True) for key, (_, value) in zip(keys, node.value, strict=True)
        }  # type: ignore[no-untyped-call]

    Strict.add_constructor("tag:yaml.org,2002:map", mapping)
    for path in CONFIGS.rglob("*.yaml"):
        yaml.load(path.read_text(), Strict)


def test_a_recipe_yields_to_overrides_whatever_their_order() -> None:
    for overrides in (
        ["experiment=fedmf_ml100k", "algorithm.negatives=3"],
        ["algorithm.negatives=3", "experiment=fedmf_ml100k"],
    ):
        config = load_config(overrides)
        assert config["algorithm"]["negatives"] == 3
        assert config["federation"]["server_optimizer"] == "adam"


def test_sweeps_multiply_out_in_order() -> None:
    assert expand_sweep(["a=1,2", "b=x", "c=range(0,2)"]) == [
        ["a=1", "b=x", "c=0"], ["a=1", "b=x", "c=1"], ["a=2", "b=x", "c=0"], ["a=2", "b=x", "c=1"],
    ]  # fmt: skip
    assert expand_sweep(["protocol.ks=[5,10]", "name='a,b'"]) == [["protocol.ks=[5,10]", "name='a,b'"]]
