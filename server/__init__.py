"""The coordinator: who takes part, how updates become the next item view, which round is reported.

``server.strategy`` is the Flower Strategy, ``server.app`` the ServerApp; ``server.runners`` host both apps (inline,
Ray).
"""

import clients  # noqa: F401  (switches Flower's telemetry off before Flower is imported)
