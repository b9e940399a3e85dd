"""The commands of the documents: found, and run or, where a test cannot run them, checked otherwise.

A code block holds commands, or a Python program, or what somebody is shown. Which, its language says, or else
its first word. Every command runs unless `NOT_RUN` has a reason; so one that is added to a document runs from
then on, or fails until there is a reason.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.util
import io
import re
import runpy
import shlex
import sys
import tomllib
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).parent.parent
PROGRAMS = frozenset(
    {"curl", "ddpm", "python", "python3", ".venv/bin/python", ".venv-bench/bin/python", "make", "docker"}
    | {
        "pip",
        "npm",
        "node",
        "cd",
        "kubectl",
        "helm",
        "promtool",
        "docker/build-check",
        "./docker/build-check",
        "serve",
    }
    | {"buildah", "podman", "apt-get", "git", "export", "for", "mkdir", "jq", "source", "eval"}
)
"""First words by which a command is known where nothing else says that it is one."""
SHELL = frozenset({"sh", "bash", "shell", "console"})
SHOWN = re.compile(r'[{\["<]|event: |HTTP/|\w+: ')
"""How an answer begins, or a file's contents."""
ANSWER = re.compile(r'\n *\n(?=[{\["]|event: |HTTP/)')
"""Where an indented block has come to what its commands answer."""
ASSIGNMENTS = re.compile(r"((?:[A-Z_][A-Z0-9_]*=(?:'[^']*'|\"[^\"]*\"|[^\s$]\S*|) +)*)(.*)", re.DOTALL)
SERVER = re.compile(r"(make serve|ddpm serve|(\S+/)?python -m service)\b")
ADDRESS = re.compile(r"\b(localhost|127\.0\.0\.1):8000\b")


@dataclass(frozen=True)
class Block:
    """Part of a document. language: of a fenced block; `inline` of a span inside a sentence; else empty."""

    file: str
    line: int
    language: str
    text: str

    @property
    def place(self) -> str:
        """Where it is, for a message."""
        return f"{self.file}:{self.line}"


def blocks(file: str, document: str) -> Iterator[Block]:
    """The code of a document in order: fenced, indented, and commands inside sentences."""
    lines = document.splitlines()
    number = 0
    while number < len(lines):
        line, begun = lines[number], number + 1
        number += 1
        if fence := re.match(r"( *)```(\w*)", line):
            body = []
            while number < len(lines) and not lines[number].strip().startswith("```"):
                body.append(lines[number].removeprefix(fence[1]))
                number += 1
            number += 1
            yield Block(file, begun + 1, fence[2], "\n".join(body))
        elif line.startswith("    ") and not lines[begun - 2].strip():
            body = [line]
            while number < len(lines) and (lines[number].startswith("    ") or not lines[number].strip()):
                body.append(lines[number])
                number += 1
            for part in ANSWER.split("\n".join(each[4:] for each in body).strip()):
                yield Block(file, begun, "", part)
                begun += part.count("\n") + 2
        else:
            for span in re.findall(r"`([^`]+)`", line):
                if " " in span and _word(span) in PROGRAMS and "…" not in span:
                    yield Block(file, begun, "inline", span)


def kind_of(block: Block) -> str:
    """`commands`, `python` or `shown`. Raises ValueError where that cannot be told."""
    if block.language in SHELL or block.language == "inline":
        return "commands"
    if block.language:
        return "python" if block.language == "python" else "shown"
    first = next(iter(commands(block.text)), block.text)
    if _word(first) in PROGRAMS or re.match(r"\w+=\$\(", first):
        return "commands"
    if SHOWN.match(first) or first.split("\n")[0].split(" #")[0].rstrip().endswith("{"):
        return "shown"
    raise ValueError(f"{block.place}: is this a command? Name its program in PROGRAMS, or its language.")


def commands(text: str) -> list[str]:
    """The commands of a block, each whole: with continued lines, quotes and here-documents."""
    found: list[str] = []
    pending = ""
    for line in text.splitlines():
        if not pending and line.startswith("<"):
            continue  # HTML, beside the command that does the same
        pending = f"{pending}\n{line}" if pending else line.removeprefix("$ ")
        here = re.search(r"<<-?\s*['\"]?(\w+)", pending)
        if here and not pending.endswith(f"\n{here[1]}"):
            continue
        if pending.endswith("\\"):
            continue
        with contextlib.suppress(ValueError):  # a quote is open
            if here or shlex.split(pending, comments=True):
                found.append(pending)
            pending = ""
    return found + [pending] * bool(pending)


def split(command: str) -> tuple[dict[str, str], str]:
    """The variables that are set for a command, and the rest of it."""
    match = ASSIGNMENTS.match(command.replace("\\\n", " "))
    assert match is not None
    try:
        pairs = shlex.split(match[1])
    except ValueError:
        return {}, command
    variables = dict(pair.split("=", 1) for pair in pairs)
    rest = match[2].split(" #")[0].rstrip() if "<<" not in command else match[2]
    return variables, rest


def _word(command: str) -> str:
    return split(command)[1].partition(" ")[0]


# ── What a test cannot run, why, and what is checked of it ─────────────────────────────────────────


def check_make(command: str) -> None:
    """The targets exist."""
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = [word for word in shlex.split(command)[1:] if "=" not in word]
    assert set(named) <= targets, f"no such target: {command}"


def check_files(command: str) -> None:
    """The files of this repository that are named exist."""
    folders = {path.name for path in ROOT.iterdir() if path.is_dir() and not path.name.startswith(".")}
    for word in re.findall(r"[\w./-]+\.(?:ya?ml|mjs|sh|py|json)\b", command):
        if word.split("/")[0] in folders or "/" not in word:
            places = ROOT.rglob(word) if "/" not in word else [ROOT / word]
            assert any(place.exists() for place in places), f"no such file: {word}"
    for folder in re.findall(r"\bapply -k (\S+)", command):
        assert (ROOT / folder / "kustomization.yaml").exists(), f"nothing to build there: {folder}"


def check_extras(command: str) -> None:
    """The optional dependencies exist."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for extra in re.findall(r"ddpm-service\[([\w,-]+)\]", command):
        assert set(extra.split(",")) <= project["optional-dependencies"].keys(), command


class _Accepted(BaseException):
    """The program has accepted its arguments, and does not get further."""


def check_arguments(command: str) -> None:
    """The module exists, and its parser accepts the arguments; it gets no further."""
    words = shlex.split(command, comments=True)
    module, arguments = words[2], words[3:]
    spec = importlib.util.find_spec(module)
    assert spec is not None, f"no such module: {module}"
    if spec.submodule_search_locations is not None:
        spec = importlib.util.find_spec(f"{module}.__main__")
        assert spec is not None, f"this package does not run: {module}"
    if not arguments:
        return  # it is named, in a sentence
    takes = module == "service" or "parse_args" in Path(str(spec.origin)).read_text()
    assert takes, f"{module} takes no arguments"
    parse = argparse.ArgumentParser.parse_args

    def only_parse(self: argparse.ArgumentParser, *given: Any, **options: Any) -> None:
        parse(self, *given, **options)
        raise _Accepted

    said = io.StringIO()
    with (
        mock.patch.object(argparse.ArgumentParser, "parse_args", only_parse),
        mock.patch.object(sys, "argv", [module, *arguments]),
        contextlib.redirect_stderr(said),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore", RuntimeWarning)  # runpy's, of a module that is imported already
        try:
            runpy.run_module(module, run_name="__main__")
        except _Accepted:
            return
        except SystemExit:
            raise AssertionError(f"{command}: {said.getvalue()}") from None
    raise AssertionError(f"{command}: it has read no arguments")


NOT_RUN: tuple[tuple[str, str, Callable[[str], None]], ...] = (
    (r"make ", "starts the server, the tests or hours of work", check_make),
    (
        r"(docker|buildah|podman|kubectl|helm|promtool) ",
        "needs a container engine, a cluster or Prometheus",
        check_files,
    ),
    (r"(\./)?docker/build-check\b", "builds an image", check_files),
    (r"(pip|npm|cd \S+ && npm|apt-get) ", "installs something", check_extras),
    (r"node ", "needs what npm installs", check_files),
    (
        r"(\S+/)?python -m model\.(training|evaluation)\.(?!explain)",
        "needs a data set, and time",
        check_arguments,
    ),
    (r"(\S+/)?python -m model\.(convert|inspect)\b", "needs a reader's own model", check_arguments),
    (r"(\S+/)?python -m (bench\.|tests\.matrix)", "measures for minutes or hours", check_arguments),
    (r"(\S+/)?python -m service\b(?!.*--help)", "runs until it is stopped", check_arguments),
    (r"ddpm serve\b", "runs until it is stopped", lambda command: None),
    (r"serve run service\.cluster:(app|build)\b", "starts Ray", lambda command: None),
    (r"git clone ", "needs a connection", lambda command: None),
)
"""(pattern of the command, why it is not run, what is checked instead)."""


@functools.cache
def check_of(command: str) -> Callable[[str], None] | None:
    """What is checked of a command that does not run; None for one that does."""
    return next((check for pattern, _, check in NOT_RUN if re.match(pattern, command)), None)
