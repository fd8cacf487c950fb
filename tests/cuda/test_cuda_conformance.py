"""The conformance matrix on the emulated GPU: every kernel for CUDA handles the functions at once."""

from __future__ import annotations

import test_conformance
from emulation.serving import adopt

adopt(globals(), test_conformance)
