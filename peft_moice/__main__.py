"""`python -m peft_moice`."""

import sys

from .cli.main import main

sys.exit(main())
