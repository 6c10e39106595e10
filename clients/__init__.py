"""The devices: private state, batched local training and evaluation, the item view's wire format.

A Flower node hosts a cohort of devices and runs them as one tensor program; ``clients.app`` is the Flower ClientApp,
``clients.workspace`` what the nodes of a run find on disk.
"""

import os

# Flower reads these once, when it is first imported, and its defaults phone home. So they are set before anything of
# it is.
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")
