"""Makes the modules of spec/ importable for the conformance tests."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "spec"))
