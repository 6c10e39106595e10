"""The data room: what users did, in one form, wherever it came from.

Doors: ``load_dataset`` (catalogue, files, synthetic), ``describe``; ``Interactions``, ``UserItems`` and ``Split`` are
what the rooms above work on.
"""

from fedrec.data.describe import Description, describe
from fedrec.data.interactions import Interactions, UserItems
from fedrec.data.load import load_dataset
from fedrec.data.split import Split

__all__ = ["Description", "Interactions", "Split", "UserItems", "describe", "load_dataset"]
