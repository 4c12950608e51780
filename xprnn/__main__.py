"""`python -m xprnn` is the command `xprnn`."""

import sys

from .cli import main

sys.exit(main())
