"""What a plan gives its devices: the settings and the protocol as a workspace records them."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from fedrec.evaluation.protocols import Protocol
from fedrec.experiment.plan import Plan
from fedrec.experiment.privacy import device_settings


def client_settings(plan: Plan) -> dict[str, Any]:
    """The fields of :class:`clients.workspace.ClientSettings`."""
    federation, runner = plan.federation, plan.runner
    codec = {"fraction": federation.top_fraction}
    settings = {
        "seed": plan.seed,
        "n_nodes": plan.n_nodes,
        "upload": {"kind": federation.upload_codec, "precision": federation.upload_precision, **codec},
        "download": {"kind": federation.download_codec, "precision": federation.download_precision, **codec},
        "device": runner.device,
        "threads": runner.threads,
        "chunk_rows": runner.chunk_rows,
        "fused": runner.fused,
        "aggregation_counts": federation.mean == "contributors",
        "per_user_metrics": plan.evaluation.per_user,
        "private_state": plan.evaluation.private_state,
    }
    return settings | (device_settings(plan.privacy, plan.federation, plan.seed) if plan.privacy else {})


def protocol_dict(protocol: Protocol) -> dict[str, Any]:
    """The protocol as plain values."""
    return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(protocol).items()}
