"""``python -m trueup``."""

from __future__ import annotations

import sys

from trueup.cli.main import main

sys.exit(main())
