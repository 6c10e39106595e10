"""All speed figures, one after another: ``make bench`` or ``python -m benchmarks``."""

from __future__ import annotations

from benchmarks import evaluation, fedmf_cohort, fedrap_round, whole_run


def main() -> None:
    for module in (fedrap_round, fedmf_cohort, evaluation, whole_run):
        print(f"\n== {module.__name__}", flush=True)
        module.main()


if __name__ == "__main__":
    main()
