"""`python -m megatron_ext`."""

import sys

from megatron_ext.cli import main

# megatron's checkpoint writer starts a helper process that imports this file again.
if __name__ == "__main__":
    sys.exit(main())
