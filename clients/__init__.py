"""The devices: private state, batched local training and evaluation, the item view's wire format.

A Flower node hosts a cohort of devices and runs them as one tensor program; ``clients.app`` is the Flower ClientApp,
``clients.workspace`` what the nodes of a run find on disk.
"""
