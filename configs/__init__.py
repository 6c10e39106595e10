"""Hydra configuration groups, shipped with the wheel."""
