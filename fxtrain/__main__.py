"""``python -m fxtrain``, for use when the ``fxtrain`` script is not on the path."""

import sys

from fxtrain.cli import main

sys.exit(main())
