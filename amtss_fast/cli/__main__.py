"""`python -m amtss_fast.cli`, which `torchrun` and `accelerate launch` start."""

import sys

from amtss_fast.cli import main

sys.exit(main())
