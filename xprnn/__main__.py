"""`python -m xprnn` is the command `xprnn`."""

import sys

from .tools.cli import main

sys.exit(main())
