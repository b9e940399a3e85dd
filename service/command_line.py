"""The parser of a command line whose commands are pydantic models: its help, and completion by shells."""

from __future__ import annotations

from argparse import Action, ArgumentParser, _SubParsersAction
from textwrap import dedent, indent
from typing import Any, cast

import shtab
from pydantic_settings import BaseSettings, CliSettingsSource

EXAMPLES = "Examples:"
FILES = {"image", "images", "mask", "output", "arguments", "model"}
"""Options that take the path of a file or a folder."""


def parser_of(commands: type[BaseSettings], version: str) -> CliSettingsSource[ArgumentParser]:
    """The parser. The examples at the end of each docstring stand below the options."""
    source: CliSettingsSource[ArgumentParser] = CliSettingsSource(commands)
    root = source.root_parser
    root.add_argument("--version", action="version", version=f"{root.prog} {version}")
    for parser in (root, *subparsers(root).values()):
        text, found, examples = (parser.description or "").partition(EXAMPLES)
        parser.description = text.strip()
        parser.epilog = found + "\n" + indent(dedent(examples).strip(), "  ")
        for action in parser._actions:
            _explain(action)
    return source


def script(root: ArgumentParser, shell: str, programs: dict[str, type[BaseSettings]]) -> str:
    """What makes a shell complete the commands, their options, and what these take.

    programs: the commands whose options are settings, by name.
    """
    for name, settings in programs.items():
        own = CliSettingsSource[ArgumentParser](settings).root_parser
        for action in own._actions:
            _explain(action)
        subparsers(root)[name] = own
    return shtab.complete(root, shell)


def subparsers(root: ArgumentParser) -> dict[str, ArgumentParser]:
    """The parsers of the commands, by name."""
    found = next(action for action in root._actions if isinstance(action, _SubParsersAction))
    return cast("dict[str, ArgumentParser]", found.choices)


def _explain(action: Action) -> None:
    """Tell completion what an option takes, names in braces being all that there are; drop empty defaults."""
    what: Any = action
    action.help = (action.help or "").replace(" (default: None)", "")
    if isinstance(action.metavar, str) and action.metavar.startswith("{") and action.choices is None:
        action.choices = action.metavar[1:-1].split(",")
    if action.dest.rpartition(".")[2] in FILES:
        what.complete = shtab.FILE
