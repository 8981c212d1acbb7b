"""`python -m rome_fast` is `rome-fast`."""

import sys

from .cli import main

sys.exit(main())
