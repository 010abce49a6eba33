"""`python -m longattn`: the command `longattn`, where its script is not on the path."""

import sys

from longattn.cli import main

sys.exit(main())
