"""Where these tests find the experiments, and the tiny models of the package's tests."""

import sys
from pathlib import Path

RESEARCH = Path(__file__).parents[1]
sys.path[:0] = [str(RESEARCH), str(RESEARCH.parents[1] / "tests")]
