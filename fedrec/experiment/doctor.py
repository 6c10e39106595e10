"""``fedrec doctor``: looks at what runs depend on, and says how to mend what is wrong."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, requires, version

import psutil
from packaging.requirements import Requirement
from rich.console import Console
from rich.table import Table

from fedrec.data.catalogue import catalogue

Finding = tuple[bool, str, str]  # fine?, what is there, how to mend it


def examine(console: Console) -> int:
    """Print one row a check; 1 if any failed, else 0."""
    table = Table(title="fedrec doctor", title_justify="left")
    for column in ("check", "", "found", "remedy"):
        table.add_column(column, overflow="fold")
    healthy = True
    for name, check in _CHECKS.items():
        fine, found, remedy = check()
        healthy &= fine
        table.add_row(name, "[green]ok[/green]" if fine else "[red]wrong[/red]", found, "" if fine else remedy)
    console.print(table)
    return 0 if healthy else 1


def _python() -> Finding:
    return sys.version_info >= (3, 11), sys.version.split()[0], "install Python 3.11 or newer"


def _packages() -> Finding:
    try:
        needed = [Requirement(line) for line in requires("fedrec") or []]
    except PackageNotFoundError:
        return False, "fedrec is not installed", "pip install -e . -c constraints.txt"
    wrong = []
    for requirement in needed:
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            found = version(requirement.name)
        except PackageNotFoundError:
            wrong.append(f"{requirement.name} is missing")
            continue
        if not requirement.specifier.contains(found, prereleases=True):
            wrong.append(f"{requirement.name} {found} (need {requirement.specifier})")
    names = ("flwr", "ray", "torch", "numpy", "numba", "opacus", "hydra-core")
    found = ", ".join(f"{name} {version(name)}" for name in names)
    return not wrong, "; ".join(wrong) or found, "pip install -e . -c constraints.txt"


def _threads() -> Finding:
    import torch

    cores = os.cpu_count() or 1
    set_by = os.environ.get("OMP_NUM_THREADS")
    fine = set_by is None or (set_by.isdigit() and 1 <= int(set_by) <= cores)
    found = f"{cores} cores, torch would use {torch.get_num_threads()} threads, OMP_NUM_THREADS {set_by or 'not set'}"
    return fine, found, f"unset OMP_NUM_THREADS, or set it to at most {cores}; runs pin runner.threads in every worker"


def _memory() -> Finding:
    memory = psutil.virtual_memory()
    fine = memory.available > 2 * 2**30
    return (
        fine,
        f"{memory.available / 1e9:.1f} of {memory.total / 1e9:.1f} GB free",
        "free at least 2 GB, or runner.workers=1",
    )


def _shared_memory() -> Finding:
    if not os.path.isdir("/dev/shm"):
        return True, "no /dev/shm on this system", ""
    free = psutil.disk_usage("/dev/shm").free
    return (
        free > 600 * 2**20,
        f"{free / 1e9:.1f} GB free in /dev/shm",
        "Ray's object store needs 0.6 GB (docker run --shm-size=1g)",
    )


def _where() -> int:
    return os.getpid()


def _ray() -> Finding:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray

    try:
        ray.init(
            address="local", num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR,
            object_store_memory=100 * 2**20,
        )  # fmt: skip
        answer = ray.get(ray.remote(_where).remote(), timeout=60)
        return answer != os.getpid(), f"a worker process answered (pid {answer})", "see the Ray log named above"
    except Exception as error:  # whatever Ray raises is the finding
        return (
            False,
            f"{type(error).__name__}: {error}",
            "runner=inline works without Ray; check /dev/shm, /tmp and firewalls on loopback",
        )
    finally:
        ray.shutdown()


def _gpu() -> Finding:
    import torch

    if torch.cuda.is_available():
        return True, torch.cuda.get_device_name(0), ""
    return True, "no GPU (none is needed)", ""


def _data() -> Finding:
    from fedrec.data.download import cache_folder

    folder = cache_folder()
    parent = folder
    while not parent.exists():
        parent = parent.parent
    fine = os.access(parent, os.W_OK)
    return (
        fine,
        f"cache {folder}; {len(catalogue())} data sets in the catalogue",
        "set FEDREC_CACHE_DIR to a folder you can write to",
    )


_CHECKS: dict[str, Callable[[], Finding]] = {
    "Python": _python,
    "packages": _packages,
    "threads": _threads,
    "memory": _memory,
    "shared memory": _shared_memory,
    "Ray": _ray,
    "GPU": _gpu,
    "data cache": _data,
}
