"""``python -m lightning_peft.cli`` is ``lightning-peft``."""

import sys

from lightning_peft.cli import main

sys.exit(main())
