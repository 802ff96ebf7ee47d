"""Where these tests find the experiments, and the tiny models of the package's tests."""

import sys
from pathlib import Path

RESEARCH = Path(__file__).parents[1]
EXAMPLES = RESEARCH.parent
sys.path[:0] = [str(RESEARCH), str(EXAMPLES.parent / "tests")]
sys.path += [str(folder) for folder in (RESEARCH / "paper", EXAMPLES, EXAMPLES / "benchmarks")]
