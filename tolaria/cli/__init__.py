"""The command line: ``tolaria`` or ``python -m tolaria``."""
