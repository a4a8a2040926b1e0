"""Owns `python -m memcontrol.cli`."""

import sys

from memcontrol.cli import main

sys.exit(main())
