"""Where the two Flower apps run: in this process, or as Ray actors under Flower's simulation engine.

This is the only module that touches ``run_simulation``. Flower deprecates it in favour of ``flwr run``, but it is the
one public way to give Ray its arguments (docs/runners.md); keep it thin.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Mapping
from typing import Any

from clients.workspace import Workspace
from fedrec.errors import ConfigError
from server.guard import Guard
from server.outcome import Outcome
from server.phase import Phase
from server.settings import EvaluationSettings, FederationSettings, RunnerSettings
from server.strategy import FedRecStrategy, Listener
from server.watch import Watch


def run_federation(
    workspace: Workspace,
    federation: FederationSettings,
    evaluation: EvaluationSettings,
    runner: RunnerSettings,
    listener: Listener | None = None,
    stop: Callable[[], bool] = lambda: False,
    guard: Guard | None = None,
    watch: Watch | None = None,
    phase: Phase | None = None,
) -> Outcome:
    """All rounds of a federation on the configured runner.

    ``stop`` is asked between rounds; when it says so the outcome's status is ``interrupted``. When too few devices
    answer it is ``failed``, with the reason. ``phase`` runs some rounds from a state at rest instead.
    """
    strategy = FedRecStrategy(workspace, federation, evaluation, listener, stop, guard, watch, phase)
    n_nodes = workspace.settings.n_nodes
    if runner.name == "inline":
        _inline(strategy, n_nodes)
    else:
        _ray(strategy, n_nodes, min(runner.worker_count, n_nodes), runner)
    return strategy.outcome


def _inline(strategy: FedRecStrategy, n_nodes: int) -> None:
    from flwr.app import Context, RecordDict

    from clients.app import app as client_app
    from server.app import make_app
    from server.inline import InlineGrid

    make_app(strategy, parallel=1)(InlineGrid(client_app, n_nodes), Context(1, 1, {}, RecordDict(), {}))


def backend_config(workers: int, runner: RunnerSettings) -> dict[str, Any]:
    """What Flower's Ray back end is given. Ray retries a killed worker's task; ``clients.store`` makes that safe."""
    return {
        # An explicit local address: a Ray that happens to run on this host must not be joined by accident.
        "init_args": {
            "address": "local",
            "num_cpus": workers,
            "include_dashboard": False,
            "log_to_driver": False,
            "logging_level": logging.ERROR,
            "object_store_memory": 512 * 2**20,
        },
        "client_resources": {
            "num_cpus": 1,
            "num_gpus": runner.gpus_per_worker,
            "max_restarts": -1,
            "max_task_retries": runner.retries,
        },
    }


def _ray(strategy: FedRecStrategy, n_nodes: int, workers: int, runner: RunnerSettings) -> None:
    # Flower's and Ray's defaults phone home, print, or let OpenMP start a thread per core in every worker.
    for name, value in {
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "OMP_NUM_THREADS": str(runner.threads),
    }.items():
        os.environ.setdefault(name, value)
    if runner.device.startswith("cuda") and runner.gpus_per_worker <= 0:
        raise ConfigError(
            "runner.device=cuda on Ray needs runner.gpus_per_worker above 0, for example 0.5 for two workers"
        )
    from flwr.simulation import run_simulation

    from clients.app import app as client_app
    from server.app import make_app

    logging.getLogger("flwr").setLevel(logging.CRITICAL)
    _ray_messages_to_log()
    _end_workers_in_order()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run_simulation(
            server_app=make_app(strategy, parallel=workers),
            client_app=client_app,
            num_supernodes=n_nodes,
            backend_name="ray",
            backend_config=backend_config(workers, runner),
        )


def _end_workers_in_order() -> None:
    """Flower's workers leave by a task of their own; that one must not be retried as the others are.

    Otherwise Ray reports every orderly end as a failure. ``ray.method`` is the public way to say so, for classes of
    one's own.
    """
    from flwr.simulation.ray_transport.ray_actor import ClientAppActor

    metadata = getattr(ClientAppActor, "__ray_metadata__", None)
    if metadata is not None:
        metadata.method_meta.max_task_retries["terminate"] = 0


def _ray_messages_to_log() -> None:
    """What the raylet says (a worker died, a task runs again) goes to the run's log instead of standard output.

    Ray prints it whatever ``log_to_driver`` says, and there is no public switch for it.
    """
    import ray._private.worker as worker

    def to_log(data: Mapping[str, Any], ignore_prefix: bool = False) -> None:
        for line in data.get("lines", []):
            logging.getLogger("fedrec.run").info("ray: %s", line)

    if hasattr(worker, "print_to_stdstream"):
        worker.print_to_stdstream = to_log
