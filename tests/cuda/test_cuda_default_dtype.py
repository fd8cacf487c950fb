"""The default dtype beside every kernel for CUDA, on the emulated GPU."""

from __future__ import annotations

import test_default_dtype
from emulation.serving import adopt

adopt(globals(), test_default_dtype)
