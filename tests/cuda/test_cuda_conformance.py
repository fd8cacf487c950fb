"""The conformance matrix and the limits of focus on the emulated GPU: every CUDA kernel handles the functions."""

from __future__ import annotations

import test_conformance
import test_focus_limits
from emulation.serving import adopt

adopt(globals(), test_conformance, test_focus_limits)
