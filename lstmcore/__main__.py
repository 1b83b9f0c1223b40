"""``python -m lstmcore``: see :mod:`lstmcore.cli`."""

import sys

from lstmcore.cli import main

sys.exit(main())
