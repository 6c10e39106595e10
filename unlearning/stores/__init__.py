"""What training leaves behind for strategies that replay it.

Doors: ``history`` (the update history, bounded and purgeable), ``size`` (its size, before training).
"""
