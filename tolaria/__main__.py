"""``python -m tolaria`` is the ``tolaria`` command."""

from tolaria.cli.main import shell_command

shell_command()
