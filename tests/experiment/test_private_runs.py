"""Whole private runs through the public door: what they refuse, what they claim, what their ledger and attacks say."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import fedrec
from fedrec.cli import main
from fedrec.errors import ConfigError
from fedrec.experiment.result import RunResult
from privacy.ledger import Ledger

SMALL = (
    "dataset=synthetic", "dataset.users=80", "dataset.items=100", "dataset.mean_activity=20", "runner=inline",
    "federation.rounds=3", "evaluation.every=10", "algorithm.dim=8", "baselines.local_only=false",
    "baselines.ease=false",
)  # fmt: skip
USER_DP = ("privacy=user_dp", "privacy.epsilon=4")


def run(folder: Path, *overrides: str) -> RunResult:
    return fedrec.run(*SMALL, f"output_dir={folder}", *overrides)


def test_a_private_run_says_what_it_guarantees_and_the_ledger_bears_it_out(tmp_path: Path) -> None:
    result = run(tmp_path, *USER_DP, "federation.sampler=poisson", "federation.fraction=0.5")
    said = result.summary["privacy"]
    assert (said["unit"], said["sampler"], said["sample_rate"]) == ("user", "poisson", 0.5)
    assert said["delta"] == pytest.approx(80**-1.1)
    assert said["private"] is True
    assert 3.9 < said["epsilon"] <= 4.0
    assert said["accountant"] == "prv"
    assert re.match(
        r"\(4, 0\.0081\)-differential privacy for one user \(add or remove\), Poisson sampling at 0\.5, 3 releases, "
        r"PRV accountant\. Trusted: the server\.", said["statement"],
    )  # fmt: skip
    assert result.summary["select_on"] == "the last round"
    ledger = Ledger.read(result.run_dir)
    assert len(ledger.entries) == said["releases"] == 3
    assert ledger.composed()["user"].value == said["epsilon"]
    lines = [json.loads(line) for line in (result.run_dir / "metrics.jsonl").read_text().splitlines()]
    assert all(line["clip"] == 1.0 and line["noise_norm"] > 0.0 for line in lines)
    assert said["signal_to_noise"] == pytest.approx(sum(x["signal_norm"] / x["noise_norm"] for x in lines) / 3)


def test_the_same_seed_is_another_result_unless_the_noise_is_fixed_and_then_it_is_not_private(tmp_path: Path) -> None:
    first, second = (run(tmp_path, *USER_DP).item_view()["item"] for _ in range(2))
    assert not torch.equal(first, second)
    fixed = [run(tmp_path, *USER_DP, "privacy.noise_seed=3", f"federation.nodes={n}") for n in (1, 4)]
    # Only float32 sums over other groups of users differ: noise and sampling do not depend on the layout.
    torch.testing.assert_close(fixed[0].item_view()["item"], fixed[1].item_view()["item"], rtol=0.0, atol=1e-5)
    said = fixed[0].summary["privacy"]
    assert said["private"] is False
    assert "no differential privacy for one user" in said["statement"]
    assert "fixed: 3 (not private)" in (fixed[0].run_dir / "ledger.json").read_text()


def test_an_infinite_epsilon_is_the_plain_method_and_claims_nothing(tmp_path: Path) -> None:
    plain = run(tmp_path, "federation.upload_codec=dense")
    free = run(tmp_path, "privacy=user_dp", "privacy.epsilon=inf")
    torch.testing.assert_close(plain.item_view()["item"], free.item_view()["item"], rtol=0.0, atol=1e-6)
    said = free.summary["privacy"]
    assert said["epsilon"] is None
    assert said["private"] is False
    assert said["statement"] == "no differential privacy: no noise was added"


def test_a_follow_up_run_on_the_same_data_counts_what_was_spent_before(tmp_path: Path) -> None:
    first = run(tmp_path, *USER_DP)
    second = run(tmp_path, *USER_DP, f"privacy.ledger={first.run_dir}")
    said = second.summary["privacy"]
    assert said["releases"] == 6
    once = run(tmp_path, "privacy=user_dp", "federation.rounds=6",
               f"privacy.noise_multiplier={said['noise_multiplier']}")  # fmt: skip
    assert said["epsilon"] == pytest.approx(once.summary["privacy"]["epsilon"], rel=1e-6)
    assert said["epsilon"] > 4.0


def test_a_budget_stops_the_run_before_the_release_that_would_exceed_it(tmp_path: Path) -> None:
    first = run(tmp_path, *USER_DP)
    second = run(tmp_path, *USER_DP, f"privacy.ledger={first.run_dir}", "privacy.budget=5")
    assert second.status == "early_stopped"
    assert "would exceed privacy.budget=5" in str(second.summary["reason"])
    assert 0 < second.rounds < 3
    assert second.summary["privacy"]["epsilon"] <= 5.0
    with pytest.raises(ConfigError, match=r"privacy\.budget=4\.1: .* of it is spent in the ledger"):
        run(tmp_path, *USER_DP, f"privacy.ledger={first.run_dir}", "privacy.budget=4.1")


def test_a_ledger_of_other_data_or_with_a_broken_chain_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    first = run(tmp_path, *USER_DP)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ConfigError, match=r"privacy\.ledger=.* is of synthetic \(80 users.*write privacy\.ledger=null"):
        run(tmp_path, *USER_DP, f"privacy.ledger={first.run_dir}", "dataset.users=81")
    ledger = first.run_dir / "ledger.json"
    ledger.write_text(ledger.read_text().replace('"round": 2', '"round": 3'))
    with pytest.raises(ConfigError, match=r"privacy\.ledger=.*: entry 1 was changed after it was written"):
        run(tmp_path, *USER_DP, f"privacy.ledger={first.run_dir}")
    assert sorted(tmp_path.rglob("*")) == before


def test_secure_aggregation_is_called_simulated_and_pays_for_those_who_came(tmp_path: Path) -> None:
    result = run(
        tmp_path, *USER_DP, "privacy.trust=secure_aggregation", "privacy.min_survivors=40",
        "federation.upload_codec=touched",
    )  # fmt: skip
    said = result.summary["privacy"]
    assert said["trust"] == "simulated secure aggregation"
    # 80 devices brought noise that 40 would have sufficed for: half the variance is a gift.
    assert said["epsilon"] < 3.0
    assert {entry.survivors for entry in Ledger.read(result.run_dir).entries} == {80}
    # Noise lies on every row, so every row is sent, whatever the codec would have left out.
    assert result.summary["traffic"]["upload_bytes_per_user_round"] == 100 * 8 * 4


def test_example_level_privacy_says_that_it_is_none_for_a_user(tmp_path: Path) -> None:
    for extra in ((), ("federation.mode=silo", "federation.nodes=3")):
        said = run(tmp_path, "privacy=example_dp", "privacy.epsilon=4", "privacy.steps=4", *extra).summary["privacy"]
        assert said["unit"] == "interaction"
        assert "is no guarantee for a user" in said["statement"]
        assert said["releases"] == 12
        assert said["adjacency"] == "add/remove one interaction"


def test_models_of_several_orders_of_tied_timestamps_are_said_to_compose(tmp_path: Path) -> None:
    said = run(tmp_path, *USER_DP, "protocol.ties=random", "protocol.tie_draws=2").summary["privacy"]
    assert said["statement"].startswith("(4, ")
    assert said["statement"].endswith("each a model of its own: who sees several of them gets their composition.")


def test_local_privacy_is_stated_for_replacing_a_user(tmp_path: Path) -> None:
    said = run(tmp_path, "privacy=local_dp", "privacy.epsilon=4").summary["privacy"]
    assert said["adjacency"] == "replace one user"
    assert said["trust"] == "the user's own device"
    padded = run(
        tmp_path, "privacy=local_dp", "privacy.epsilon=4", "privacy.row_set=padded", "privacy.padded_rows=70",
        "federation.upload_codec=touched", "algorithm.item_weight_decay=0",
    )  # fmt: skip
    assert any("set of uploaded rows" in text for text in padded.summary["privacy"]["not_covered"])
    assert padded.summary["traffic"]["upload_bytes_per_user_round"] == 70 * (4 + 8 * 4)


def attacks(folder: Path, *overrides: str) -> Any:
    return run(folder, "attack=interaction", "attack.users=40", "evaluation.every=3", *overrides).summary["attacks"]


def test_what_a_server_sees_of_a_user_depends_on_the_codec_and_on_the_mechanism(tmp_path: Path) -> None:
    sparse = attacks(tmp_path)["interaction"]
    assert [found["round"] for found in sparse] == [1, 3]
    assert all(found["sign"]["f1"] > 0.95 for found in sparse)
    assert all(found["row_set"]["recall"] == 1.0 for found in sparse)
    central = attacks(tmp_path, *USER_DP)["interaction"]
    assert central[0]["sign"]["auc"] > 0.95  # noise on the sum does nothing against the server itself
    local = attacks(tmp_path, "privacy=local_dp", "privacy.epsilon=1")["interaction"]
    assert local[0]["sign"]["auc"] < 0.6
    assert local[0]["row_set"]["auc"] == 0.5
    hidden = attacks(
        tmp_path, *USER_DP, "privacy.trust=secure_aggregation", "federation.upload_codec=touched",
        "federation.sampler=poisson", "federation.fraction=0.1", "privacy.min_survivors=1", "privacy.noise_seed=2",
        "algorithm.negatives=1",
    )["interaction"]  # fmt: skip
    assert "sign" not in hidden[0]
    assert hidden[0]["singletons"]["user_share"] > 0.0
    assert hidden[0]["singletons"]["visible"] is False  # the devices' noise lies on every row
    assert hidden[0]["linked"]["pairs"] == 0


def test_membership_and_audit_are_reported_beside_the_claim(tmp_path: Path) -> None:
    result = run(tmp_path, "attack=all", "attack.canaries=40", *USER_DP)
    found = result.summary["attacks"]
    assert result.summary["dataset"]["users"] == 72
    assert found["membership"]["fold_in"]["nonmembers"] <= 8
    assert 0.0 <= found["membership"]["score"]["auc"] <= 1.0
    audit = found["audit"]
    assert audit["claimed_epsilon"] == result.summary["privacy"]["epsilon"]
    assert audit["violated"] is False
    assert 0.0 <= found["attribute"][0]["gender"]["auc"] <= 1.0
    plain = run(tmp_path, "attack=audit", "attack.kinds=[audit,membership]").summary["attacks"]
    assert "claims none" in plain["audit"]["skipped"]


def test_private_fedease_runs_from_the_front_door_in_both_placements_of_the_noise(tmp_path: Path) -> None:
    small = [text for text in SMALL if not text.startswith("algorithm.")]
    for trust in ("server", "secure_aggregation"):
        result = fedrec.run(
            *small, f"output_dir={tmp_path}", "algorithm=fedease_private", *USER_DP, f"privacy.trust={trust}"
        )
        assert result.rounds == 2
        assert result.summary["privacy"]["accountant"] == "gaussian"
        spent = result.summary["privacy"]["epsilon"]
        assert spent == pytest.approx(4.0, rel=1e-6) if trust == "server" else spent < 4.0
        # More devices came than the shares were sized for: what the ledger counts is never less noise than was planned.
        planned = sum(z**-2 for z in result.summary["privacy"]["noise_multipliers"])
        counted = sum(entry.noise_multiplier**-2 for entry in Ledger.read(result.run_dir).entries)
        survivors = 80 / 64 if trust == "secure_aggregation" else 1.0
        assert counted == pytest.approx(planned / survivors)


USER, LOCAL, EXAMPLE = ([f"privacy={mode}", "privacy.epsilon=4"] for mode in ("user_dp", "local_dp", "example_dp"))
MISTAKES: list[tuple[list[str], str]] = [
    (["privacy.epsilon=4"], r"privacy\.epsilon: privacy=none has no such setting; choose a mechanism first"),
    (["privacy=user_dp"], r"nothing says how much noise; write privacy\.epsilon=4"),
    (["privacy=user_dp", "privacy.epsilon=0"], r"privacy\.epsilon=0\.0: write a positive number"),
    (["privacy=user_dp", "privacy.epsilon=-1"], r"privacy\.epsilon=-1\.0: write a positive number"),
    (
        [*USER, "privacy.delta=0.0125"],
        r"privacy\.delta=0\.0125: with 80 users it must be below 1/80",
    ),
    (
        [*USER, "federation.sampler=poisson", "federation.fraction=0"],
        r"federation\.fraction=0\.0: write",
    ),
    (
        [*USER, "federation.sampler=poisson", "federation.fraction=1.5"],
        r"federation\.fraction=1\.5: write",
    ),
    (
        [*USER, "privacy.max_grad_norm=0"],
        r"privacy\.max_grad_norm=0\.0: the clipping norm is a positive",
    ),
    (
        [*USER, "federation.sampler=fixed"],
        r"federation\.sampler=fixed: .*write federation\.sampler",
    ),
    (
        [*USER, "federation.upload_codec=touched"],
        r"write federation\.upload_codec=dense, or privacy\.trust",
    ),
    (
        [*LOCAL, "federation.upload_codec=topk"],
        r"write federation\.upload_codec=dense, or privacy\.row_set",
    ),
    (
        [*USER, "federation.mean=contributors"],
        r"federation\.mean=contributors: .*without noise",
    ),
    (
        [*USER, "federation.patience=3"],
        r"federation\.patience=3: stopping on validation data",
    ),
    (
        [*USER, "privacy.trust=secure_aggregation", "privacy.min_survivors=81"],
        r"privacy\.min_survivors=81: a round expects 80 devices",
    ),
    (
        [*USER, "privacy.ledger=nowhere"],
        r"nowhere/ledger\.json: cannot be read",
    ),
    (
        [*EXAMPLE, "privacy.optimizer=opacus"],
        r"privacy\.optimizer=opacus: .*write federation\.mode=silo",
    ),
    (
        [*USER, "federation.mode=silo"],
        r"federation\.mode=silo: .*write privacy=example_dp",
    ),
    (
        [*EXAMPLE, "federation.mode=silo", "federation.sampler=poisson", "federation.fraction=0.5"],
        r"federation\.sampler=poisson: every silo trains in every round",
    ),
    (["federation.mode=silo"], r"federation\.mode=silo: silos train with DP-SGD; write privacy=example_dp"),
    (
        ["algorithm=fedrap", *EXAMPLE],
        r"privacy=example_dp: fedrap keeps .*; write algorithm=fedmf",
    ),
    (
        [*LOCAL, "privacy.row_set=padded"],
        r"privacy\.padded_rows=0: write how many rows",
    ),
    (["attack=audit"], r"attack\.kinds=\[audit\]: .*claims none; write privacy=user_dp"),
    (["attack.users=3"], r"attack\.users: attack=none has no such setting; choose an attack first"),
    (["attack=membership", "attack.holdout=0"], r"attack\.holdout=0: write a share"),
    (["attack=interaction", "attack.rounds=[0]"], r"attack\.rounds=\[0\]: write round numbers from 1"),
    (
        [*USER, "privacy.accountant=gdp"],
        r"privacy\.accountant=gdp: write auto or prv or rdp",
    ),
    (
        [*USER, "federation.rounds=0"],
        r"federation\.rounds=0 asks for as many",
    ),
]


@pytest.mark.parametrize(("overrides", "message"), MISTAKES, ids=[" ".join(case[0]) for case in MISTAKES])
def test_a_guarantee_that_would_be_wrong_is_refused_in_one_line_before_any_training(
    overrides: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = [text for text in SMALL if not (text.startswith("algorithm.") and "algorithm=fedrap" in overrides)]
    assert main(["run", f"output_dir={tmp_path}", *small, *overrides]) == 2
    shown = capsys.readouterr().err
    assert re.search(message, shown), shown
    assert shown.count("\n") == 1
    assert not list(tmp_path.iterdir())
