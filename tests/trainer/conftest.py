"""The trainer is tested where TRL can be installed: from Python 3.11 on."""

from __future__ import annotations

import sys

collect_ignore_glob = ["test_*.py"] if sys.version_info < (3, 11) else []
