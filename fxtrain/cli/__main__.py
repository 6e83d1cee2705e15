"""``python -m fxtrain.cli``: the command line where the script is not on the path."""

import sys

from fxtrain.cli import main

sys.exit(main())
