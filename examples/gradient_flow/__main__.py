"""``python examples/gradient_flow``: what ``python -m lstmcore flow`` runs."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # Python puts this folder there, which is a package in that one

from gradient_flow.command import main

sys.exit(main())
