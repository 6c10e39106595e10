"""What a run costs this machine: CPU seconds and peak memory of this process and all its children (Ray's included)."""

from __future__ import annotations

import threading
import time
from types import TracebackType

import psutil


class ResourceMonitor:
    """Samples the process tree until it is left. Memory is proportional: a page shared by three counts a third."""

    def __init__(self, interval: float = 0.5) -> None:
        self._interval = interval
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._cpu: dict[int, float] = {}
        self._start_cpu = 0.0
        self.peak_rss_mb = 0.0
        self._began = time.perf_counter()

    def __enter__(self) -> ResourceMonitor:
        self._start_cpu = _cpu_of(psutil.Process())
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.sample()
        self._done.set()
        self._thread.join()

    @property
    def cpu_s(self) -> float:
        """CPU seconds of all processes seen, since the start."""
        return sum(self._cpu.values()) - self._start_cpu

    @property
    def wall_s(self) -> float:
        return time.perf_counter() - self._began

    def _watch(self) -> None:
        while not self._done.wait(self._interval):
            self.sample()

    def sample(self) -> None:
        """Look once."""
        total = 0.0
        own = psutil.Process()
        for process in [own, *own.children(recursive=True)]:
            try:
                self._cpu[process.pid] = _cpu_of(process)
                total += _memory_of(process)
            except psutil.Error:
                continue  # it ended between the listing and the look
        self.peak_rss_mb = max(self.peak_rss_mb, total / 2**20)


def _cpu_of(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def _memory_of(process: psutil.Process) -> float:
    full = process.memory_full_info()
    return float(getattr(full, "pss", 0) or full.rss)
