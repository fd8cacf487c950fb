"""Conformance, the limits of focus and long responses on the emulated GPU: every CUDA kernel handles the functions."""

from __future__ import annotations

import test_conformance
import test_focus_limits
import test_long_responses
from emulation.serving import adopt

adopt(globals(), test_conformance, test_focus_limits, test_long_responses)
