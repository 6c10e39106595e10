"""``python -m fedrec`` is the command ``fedrec``."""

import sys

from fedrec.cli import main

sys.exit(main())
