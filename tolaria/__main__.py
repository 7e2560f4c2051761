"""``python -m tolaria`` is the ``tolaria`` command."""

import sys

from tolaria.cli.main import main

sys.exit(main())
