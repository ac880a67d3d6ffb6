"""`python -m query_experts_command`: the console command, also from a checkout that isn't installed."""

import sys

from query_experts_command import main

sys.exit(main())
