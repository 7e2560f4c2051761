"""What the pages tell people to type is known to ``run_commands.py``, which types it."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent))
from commands import KNOWN, PROGRAMS, ROOT, find

from tolaria.cli.main import COMMANDS, build_parser

FOUND = find()


def test_every_command_is_known_and_every_known_one_is_documented():
    documented = {each.text for each in FOUND}
    assert documented - KNOWN.keys() == set(), "add them to tests/docs/commands.py"
    assert KNOWN.keys() - documented == set(), "no page has them any more"


def test_commands_are_found_where_people_look():
    places = {(each.page, each.text) for each in FOUND}
    assert ("README.md", 'pip install ".[train]" && tolaria train digits') in places
    assert ("CONTRIBUTING.md", "pre-commit install") in places
    assert ("docs/training.md", "tolaria train [TASK]") in places
    assert ("examples/drop_in.py", "python examples/drop_in.py") in places


@pytest.mark.parametrize("command", sorted({k.run or text for text, k in KNOWN.items() if not k.skip}))
def test_what_a_command_names_is_there(command):
    """Options of our command parse, scripts exist; in a second, whatever the command would take."""
    for part in command.split("&&"):
        words = [word for word in shlex.split(part) if "=" not in word or word.startswith("-")]
        if words[0] == "tolaria":
            build_parser(words[1]).parse_args(words[1:])
        for word in words[1:]:
            assert not word.endswith(".py") or (ROOT / word).exists(), word


@pytest.mark.parametrize("name", COMMANDS)
def test_help_prints_and_says_each_default_once(name, capsys):
    with pytest.raises(SystemExit) as caught:
        build_parser(name).parse_args([name, "--help"])
    assert caught.value.code == 0
    assert "%" not in capsys.readouterr().out


def test_script_lists_what_it_would_do():
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests/docs/run_commands.py"), "--list"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "would run tolaria doctor" in done.stdout
    assert "left out bash .ci/run" in done.stdout


def test_programs_of_pages_are_those_that_are_looked_for():
    """A page that begins to speak of another program must not go unread."""
    import re

    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")):
        for block in re.findall(
            r"^```(?:sh|bash|shell|console)\n(.*?)^```", path.read_text(), re.DOTALL | re.M
        ):
            for line in block.splitlines():
                assert line.removeprefix("$ ").split()[0] in PROGRAMS, f"{path.name}: {line}"
