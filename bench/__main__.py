"""``python -m bench``."""

import sys

from bench.gpu import install

if __name__ == "__main__":
    if sys.argv[1:2] == ["gpu"]:
        install.first(sys.argv[1:])
    from bench.cli import main

    sys.exit(main())
