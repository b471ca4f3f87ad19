"""Makes `federation` and `devices` of tests/faults importable: benchmarks deploy the way the tests do."""

from __future__ import annotations

import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[1] / "tests" / "faults"

if str(FOLDER) not in sys.path:
    sys.path.insert(0, str(FOLDER))
