"""Attacks that a privacy budget should stop: pure functions on what a server sees, each with its reference.

``views`` is what is seen and (apart) what is true; ``interaction`` and ``aggregate`` read uploads and secure sums,
``membership`` the released item view, ``attribute`` a user's uploads, ``audit`` the noise itself.
"""
