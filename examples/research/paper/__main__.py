"""The tables of the MoICE paper, one command each; README.md says which.

python examples/research/paper TABLE --model MODEL [--small]
"""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path += [str(folder) for folder in (HERE.parent, HERE.parents[1], HERE.parents[1] / "benchmarks")]

from command import main, parse  # noqa: E402

main(parse())
