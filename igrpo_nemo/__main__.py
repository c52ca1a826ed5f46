"""`python -m igrpo_nemo`: the command line where the script `igrpo` is not on the path."""

import sys

from igrpo_nemo.cli import main

if __name__ == "__main__":
    sys.exit(main())
