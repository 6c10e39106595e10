"""Requests to forget, strategies that honour them, and the proof that it worked.

Doors: ``requests`` (what is asked), ``strategies`` (how it is done, one file each), ``verification`` (gates against
models that never saw the data), ``audit`` (the evidence), ``federation`` (federated rounds on a state at rest).
"""
