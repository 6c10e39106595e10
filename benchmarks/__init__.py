"""Side-by-side speed runs: ``python -m benchmarks.fedrap_round``, ``.fedmf_cohort``, ``.evaluation``. CPU-seconds,
one run."""
