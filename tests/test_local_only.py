"""The local-only baseline of a method that fedrec does not ship: it needs all that the federated one needs."""

from __future__ import annotations

from pathlib import Path

import fedrec


def test_a_content_models_local_only_baseline_sees_the_public_item_features(tmp_path: Path) -> None:
    result = fedrec.run(
        "dataset=synthetic", "dataset.users=60", "dataset.items=120", "runner=inline", "algorithm=custom",
        "algorithm._target_=tests.algorithms.test_seam.Content", "federation=average", "federation.rounds=2",
        "baselines.local_only_rounds=2", f"output_dir={tmp_path}",
    )  # fmt: skip
    assert result.status == "finished"
    alone = result.baselines["local_only"]
    assert "skipped" not in alone, alone
    assert 0.0 <= alone["test"]["hr@10"] <= 1.0
