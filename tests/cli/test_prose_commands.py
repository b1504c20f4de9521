"""Commands in the documentation's sentences: each is one that there is, with options that it has.

Those of its shell blocks are run (`test_commands.py`).
"""

from __future__ import annotations

import re
import shlex
import tomllib
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import typer

from fedzge_flwr.cli.app import app
from tests.helpers.pages import PAGES
from tests.helpers.paths import ROOT

PROGRAMS = ("make", "fedzge", "flwr", "flower-supernode", "flower-superlink", "python", "pip")


def in_prose() -> list[str]:
    """The commands between backticks, outside fenced blocks, each once."""
    found: dict[str, None] = {}
    for page in PAGES:
        text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
        for code in re.findall(r"`([^`]+)`", text):
            words = re.sub(r"\s+", " ", code).strip()
            if " " in words and words.split(" ")[0] in PROGRAMS:
                found[words] = None
    return list(found)


def options_in(words: list[str]) -> list[str]:
    return [word.partition("=")[0] for word in words if word.startswith("--")]


def source_of(module: str) -> str:
    """The text of a module, or of all the modules of a package."""
    spec = find_spec(module)
    assert spec is not None, module
    origin = Path(str(spec.origin))
    files = origin.parent.glob("*.py") if origin.name == "__init__.py" else [origin]
    return "".join(file.read_text() for file in files)


def command_in(group: Any, words: list[str]) -> Any:
    """The (sub)command of a command line that words name, as far as they do."""
    while (commands := getattr(group, "commands", {})) and words and not words[0].startswith("-"):
        assert words[0] in commands, words
        group, words = commands[words[0]], words[1:]
    return group


def test_sentences_have_commands() -> None:
    programs = {command.split(" ")[0] for command in in_prose()}
    assert {"make", "fedzge", "flwr", "python", "pip"} <= programs


@pytest.mark.parametrize("command", [c for c in in_prose() if c.startswith("make ")])
def test_a_target_there_is(command: str) -> None:
    targets = [word for word in shlex.split(command)[1:] if "=" not in word]
    known = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert set(targets) <= set(known)


@pytest.mark.parametrize("command", [c for c in in_prose() if c.startswith(("fedzge ", "flwr "))])
def test_a_subcommand_there_is(command: str) -> None:
    program, *words = shlex.split(command)
    with warnings.catch_warnings():
        # Flower's options are declared in a way that typer is to give up.
        warnings.simplefilter("ignore")
        from flwr.cli.app import app as flwr
    found = command_in(typer.main.get_command({"fedzge": app, "flwr": flwr}[program]), words)
    known = {option for parameter in found.params for option in parameter.opts} | {"--help"}
    assert set(options_in(words)) <= known


@pytest.mark.parametrize(
    "command", [c for c in in_prose() if c.startswith(("python ", "flower-supernode "))]
)
def test_a_program_has_the_options(command: str) -> None:
    words = shlex.split(command)
    if words[0] == "python":
        assert words[1] == "-m"
        source = source_of(words[2])
    else:
        source = source_of("flwr.supernode.cli.flower_supernode")
    missing = [option for option in options_in(words) if f'"{option}"' not in source]
    assert missing == []


@pytest.mark.parametrize("command", [c for c in in_prose() if c.startswith("pip ")])
def test_an_extra_there_is(command: str) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    wanted = re.findall(r"\[([a-z,-]+)\]", command)
    assert all(name in extras for names in wanted for name in names.split(","))
