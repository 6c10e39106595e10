"""What a run says of its privacy and of the attacks on it, in the terminal and in its report."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from fedrec.cli import main
from fedrec.experiment.guarantees import attack_line, guarantee, what_the_server_saw
from fedrec.experiment.report import RunRecord, read_run
from fedrec.experiment.report_privacy import attacks as attacks_section
from fedrec.experiment.report_privacy import privacy as privacy_section
from tests.experiment.run_directories import lines_of, summary_of, write_run

SMALL = (
    "dataset=synthetic", "dataset.users=60", "dataset.items=80", "runner=inline", "federation.rounds=3",
    "algorithm=fedmf", "algorithm.dim=8", "baselines.local_only=false", "baselines.ease=false",
)  # fmt: skip
NO_AUDIT = ("attack=all", "attack.kinds=[interaction,membership,attribute]", "attack.holdout=0.2")
USER = {
    "mode": "user_dp", "unit": "user", "epsilon": 4.0, "delta": 1e-5, "adjacency": "add/remove one user",
    "sampler": "poisson", "sample_rate": 0.1, "accountant": "prv", "note": None, "noise_multiplier": 1.1,
    "noise_multipliers": [1.1], "max_grad_norm": 0.5, "releases": 60, "trust": "the server", "private": True,
    "statement": "(4, 1e-05)-differential privacy for one user (add or remove), 60 releases. Trusted: the server.",
    "covers": "every view", "not_covered": ["losses", "the choice of settings"], "signal_to_noise": 0.25,
    "row_set": None, "optimizer": None,
}  # fmt: skip


class _Text(HTMLParser):
    def __init__(self, page: str) -> None:
        super().__init__()
        self.words: list[str] = []
        self.feed(page)

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def text_of(page: str) -> str:
    return re.sub(r"\s+", " ", " ".join(_Text(page).words))


def sections(lines: list[dict[str, Any]] | None = None, **changes: Any) -> str:
    """The privacy and attack sections about a summary with these changes."""
    record = RunRecord(Path("run"), summary_of(**changes), tuple(lines or ()))
    return privacy_section(record, "a") + attacks_section(record, "a")


def run(folder: Path, *overrides: str) -> tuple[dict[str, Any], str]:
    """The summary of a real run and the text of its report."""
    assert main(["run", *SMALL, f"output_dir={folder}", *overrides]) == 0
    record = read_run(next(iter(folder.glob("*/*/summary.json"))).parent)
    return dict(record.summary), text_of((record.path / "report.html").read_text())


def test_a_private_run_says_what_it_guarantees_to_whom_and_what_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    summary, report = run(tmp_path, "privacy=user_dp", "privacy.epsilon=4", "attack=all", "attack.holdout=0.2")
    said = capsys.readouterr().out
    line = next(line for line in said.splitlines() if line.startswith("Privacy: "))
    assert line.startswith("Privacy: (4, 0.0")
    assert "Trusted: the server. Not covered: what the simulator itself writes" in line
    attacks = next(line for line in said.splitlines() if line.startswith("Attacks: "))
    bound = summary["attacks"]["audit"]["epsilon_lower_bound"]
    assert f"audit: epsilon is at least {bound:.2f}, claimed 4" in attacks
    assert f"membership, fold-in {summary['attacks']['membership']['fold_in']['auc']:.2f}" in attacks
    assert "The server saw every device's own upload: it is trusted here" in attacks
    assert summary["privacy"]["statement"].rstrip(".") in report
    assert "Every release, with its noise and what it adds up to, is in ledger.json." in report
    assert "L2 norm of the mean update" in report
    assert "Area under the ROC curve" in report
    assert f"With 95 % confidence epsilon is at least {bound:.2f}; 4 is claimed." in report


def test_example_level_results_say_that_they_are_no_guarantee_for_a_user(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    summary, report = run(tmp_path, "privacy=example_dp", "privacy.epsilon=4", *NO_AUDIT)
    assert summary["privacy"]["unit"] == "interaction"
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("Privacy: "))
    assert "differential privacy for one interaction" in line
    assert "is no guarantee for a user" in line
    assert "Not a guarantee for a user." in report
    assert "a user's whole history is not" in report  # what the server saw


def test_without_noise_nothing_is_called_private(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    summary, report = run(tmp_path, "privacy=user_dp", "privacy.epsilon=inf", *NO_AUDIT)
    assert summary["privacy"]["private"] is False
    assert "Privacy: No differential privacy: no noise was added." in capsys.readouterr().out
    assert "Not private. No differential privacy: no noise was added." in report
    assert "Nothing is guaranteed: the server saw every device's own upload" in report
    assert "infinite (no guarantee)" in report


def test_a_run_without_a_mechanism_says_what_the_server_saw(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, report = run(tmp_path, *NO_AUDIT)
    said = capsys.readouterr().out
    assert "Privacy:" not in said
    assert "items, sign attack 1.00" in said  # without privacy an upload gives its user's items away
    assert "No privacy mechanism: the server saw every device's own upload" in report
    assert "Privacy" not in report.split("Attacks")[0].split("Time and memory")[1]


def test_secure_aggregation_hides_single_uploads() -> None:
    summary = summary_of(privacy={**USER, "trust": "simulated secure aggregation"})
    assert what_the_server_saw(summary).startswith("Secure aggregation (simulated): the server saw sums")


def test_a_fixed_noise_seed_is_told_as_no_privacy() -> None:
    privacy = {**USER, "private": False, "statement": "no differential privacy for one user: its seed is fixed"}
    page = text_of(sections(privacy=privacy))
    assert "Not private. No differential privacy for one user: its seed is fixed." in page
    assert guarantee(summary_of(privacy=privacy)) == "No differential privacy for one user: its seed is fixed."


def test_a_refuted_epsilon_is_the_loudest_thing_in_the_section() -> None:
    audit = {"epsilon_lower_bound": 5.25, "claimed_epsilon": 4.0, "violated": True, "confidence": 0.95, "canaries": 100}
    page = sections(privacy=USER, attacks={"audit": audit})
    assert '<p class="alert bad"><strong>The claimed epsilon is refuted.</strong>' in page
    assert "REFUTED" in attack_line(summary_of(attacks={"audit": audit}))


def test_rounds_without_a_release_and_a_moving_clip_are_shown() -> None:
    lines = [
        {**line, "clip": 1.0 / number, "signal_norm": 0.1, "noise_norm": 0.4, "clipped_share": 0.5}
        for number, line in enumerate(lines_of(6), 1)
    ]
    lines[3]["abandoned"] = "3 of at least privacy.min_survivors=9 devices: nothing was released"
    page = text_of(sections(lines, privacy=USER))
    assert "It follows a noisy quantile of the devices' norms." in page
    assert "One round was abandoned: 3 of at least privacy.min_survivors=9 devices" in page
    assert "Poisson, rate 0.1" in page


def test_what_a_file_says_cannot_become_markup() -> None:
    evil = "<script>alert(1)</script>"
    privacy = {
        **USER,
        "statement": evil,
        "trust": evil,
        "covers": evil,
        "not_covered": [evil],
        "note": evil,
        evil: evil,
    }
    attacks = {
        "interaction": [{"round": 1, "hidden": evil}], "membership": {evil: evil}, evil: evil,
        "attribute": [{"round": 1, "gender": {"skipped": evil}}], "audit": {"skipped": evil},
    }  # fmt: skip
    page = sections(lines_of(4), privacy=privacy, attacks=attacks)
    assert "<script" not in page
    assert "alert(1)" in page


@pytest.mark.parametrize("attacks", [None, {}, {"interaction": "no"}, {"membership": None}, {"audit": {}}, {"x": 3}])
def test_odd_attack_entries_break_nothing(attacks: Any) -> None:
    page = sections(privacy={"unit": "user"}, attacks=attacks)
    assert "<h3>Privacy</h3>" in page
    assert ("<h3>Attacks</h3>" in page) == bool(attacks)
    assert attack_line(summary_of(attacks=attacks)) == ""


def test_several_runs_tell_their_guarantees_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [
        write_run(tmp_path / "a", summary_of(privacy=USER), lines_of(4)),
        write_run(
            tmp_path / "b", summary_of(privacy={**USER, "statement": "(8, 1e-05)-differential privacy"}), lines_of(4)
        ),
        write_run(tmp_path / "c", summary_of(), lines_of(4)),
    ]
    assert main(["report", *map(str, runs), "-o", str(tmp_path / "all.html")]) == 0
    said = capsys.readouterr().out
    assert said.count("Privacy: ") == 2
    assert (tmp_path / "all.html").read_text().count("<h3>Privacy</h3>") == 2
