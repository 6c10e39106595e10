"""Differential privacy: what may be claimed, of what, and how it is made true.

``settings`` and ``plan`` decide what a run will release; ``accountants``, ``calibration``, ``composition`` and
``ledger`` say what that costs; ``samplers``, ``clipping``, ``lazy`` and ``eager`` are the mechanisms' parts (the noise
itself is added where the data is, in ``clients`` and ``server``); ``attacks`` put a claim to the test.
"""
