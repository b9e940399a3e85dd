"""Every command of the documents does what it is written for: it runs, or what it names exists."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.commands import (
    ADDRESS,
    ROOT,
    SERVER,
    Block,
    blocks,
    check_arguments,
    check_extras,
    check_files,
    check_make,
    check_of,
    commands,
    kind_of,
    split,
)
from tests.service.live import Process

DOCUMENTS = sorted(
    path.relative_to(ROOT).as_posix()
    for pattern in ("README.md", "CONTRIBUTING.md", "docs/*.md", "weights/*/README.md")
    for path in ROOT.glob(pattern)
)
COMMAND_S = 120
OFFERS = {"a1111": "true"}
"""Settings that turn on what the documents show and a service does not offer by itself."""
QUIET = re.compile(r"(^| )(-[a-zA-Z]*[oO] ?|--head|-X DELETE)")
"""Where curl need not show anything."""


class Reader:
    """Somebody who follows the documents: a folder, programs, and services that are running.

    The folder has copies of what the documents name, since commands write there.
    """

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.folder, self._stack = folder, stack
        self._services: dict[tuple[object, ...], str] = {}
        self.answers = folder / "answers"
        self.bin = folder / "bin"
        for made in (self.answers, self.bin):
            made.mkdir(parents=True)
        for name in ("docs", "docker", "weights"):
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("training", "*.part"))
        (folder / ".venv").symlink_to(Path(sys.prefix))
        curl = shutil.which("curl")
        assert curl, "the documents use curl"
        self._script(
            "curl",
            'number=$(ls "$ANSWERS" | wc -l)\n'
            'printf "%s\\n" "$*" > "$ANSWERS/$number.args"\n'
            f'set -o pipefail\n"{curl}" --fail-with-body "$@" | tee "$ANSWERS/$number.out"\n',
        )
        self._script("python", f'exec "{sys.executable}" "$@"\n')
        scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"].get("scripts", {})
        for name, entry in scripts.items():
            module, _, function = entry.partition(":")
            program = f"import sys; from {module} import {function}; sys.exit({function}())"
            self._script(name, f'exec "{sys.executable}" -c "{program}" "$@"\n')

    def _script(self, name: str, body: str) -> None:
        path = self.bin / name
        path.write_text(f"#!{shutil.which('bash')}\n{body}")
        path.chmod(0o755)

    def service(self, flags: Sequence[str] = (), **variables: str) -> str:
        """The address of a service with these settings, which is started where there is none yet."""
        key = (*flags, *sorted(variables.items()))
        if key not in self._services:
            offers = {f"DDPM_{name.upper()}": value for name, value in OFFERS.items()}
            process = Process([*flags], {**offers, **variables})
            self._stack.callback(process.stop)
            with closing(process.connect()) as client:
                self._services[key] = f"127.0.0.1:{client.base_url.port}"
        return self._services[key]

    def run(self, program: list[str], text: str, address: str) -> None:
        """Run a text by a program. Fails unless it ends well and what it leaves is what it says."""
        shutil.rmtree(self.answers)
        self.answers.mkdir()
        done = subprocess.run(
            [*program, ADDRESS.sub(address, text)],
            cwd=self.folder,
            env={
                **{name: value for name, value in os.environ.items() if not name.startswith("DDPM_")},
                "PATH": f"{self.bin}{os.pathsep}{os.environ['PATH']}",
                "PYTHONPATH": str(ROOT),
                "ANSWERS": str(self.answers),
                "DDPM_URL": f"http://{address}",
                "KEY": "none-needed",
            },
            capture_output=True,
            text=True,
            errors="replace",
            timeout=COMMAND_S,
        )
        assert done.returncode == 0, f"{text}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
        for answer in sorted(self.answers.glob("*.out")):
            arguments = answer.with_suffix(".args").read_text()
            content = answer.read_bytes()
            assert content or QUIET.search(arguments), f"{arguments}: no answer"
            check_content(content, arguments)
        for file in self.folder.iterdir():
            if file.is_file():
                check_file(file)


def check_content(content: bytes, what: str) -> None:
    """An answer is whole: JSON that parses, a picture, events to the last one, or headers or metrics."""
    if content[:1] in (b"{", b"["):
        json.loads(content)
    elif content.startswith((b"event: ", b": ")):
        ended = re.search(rb"^event: (\w+\.)?completed$", content, re.MULTILINE)
        assert ended, f"{what}: {content[-500:]!r}"
    elif content:
        known = (b"\x89PNG", b"\xff\xd8", b"RIFF", b"\x93NUMPY", b"HTTP/", b"# HELP", b"data: ", b"<!doctype")
        assert content.lower().startswith(tuple(each.lower() for each in known)), f"{what}: {content[:200]!r}"


def check_file(file: Path) -> None:
    """A file is what its name says."""
    if file.suffix in (".png", ".jpg", ".jpeg", ".webp"):
        with Image.open(file) as picture:
            picture.load()
    elif file.suffix == ".npy":
        assert np.load(file).size
    elif file.suffix == ".json":
        json.loads(file.read_text())


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reader]:
    """With the folder in which all documents are followed, one after the other."""
    with ExitStack() as stack:
        yield Reader(tmp_path_factory.mktemp("reader") / "folder", stack)


def follow(reader: Reader, block: Block) -> None:
    """Run a block's commands, those that follow each other as one script.

    Where one starts a service, what comes after it goes to a service with its settings.
    """
    variables: dict[str, str] = {}
    flags: list[str] = []
    script: list[str] = []
    for command in [*commands(block.text), ""]:
        settings, rest = split(command)
        check = check_of(rest) if command else None
        if script and (check or not command):
            text = "\n".join(script)
            address = reader.service(flags, **variables) if _asks(text) else "127.0.0.1:8000"
            reader.run(["bash", "-euo", "pipefail", "-c"], text, address)
            script = []
        if check:
            check(rest)
            if SERVER.match(rest):
                variables = {name: value for name, value in settings.items() if name.startswith("DDPM_")}
                flags = flags_of(rest)
        elif command:
            script.append(command)


def flags_of(command: str) -> list[str]:
    """The flags that a command starts the service with, but for the port, which the test chooses."""
    given = SERVER.sub("", command, count=1)
    if made := re.search(r"ARGS=('[^']*'|\"[^\"]*\"|\S+)", given):
        given = made[1].strip("'\"")
    return shlex.split(re.sub(r"--port[ =]\d+", "", given))


def _asks(text: str) -> bool:
    return ADDRESS.search(text) is not None or re.search(r"\bddpm\b|\bservice\.client\b", text) is not None


@pytest.mark.slow
@pytest.mark.parametrize("file", DOCUMENTS)
def test_the_commands_of_a_document_run(reader: Reader, file: str) -> None:
    for block in blocks(file, (ROOT / file).read_text()):
        try:
            match kind_of(block):
                case "commands":
                    follow(reader, block)
                case "python":
                    reader.run([sys.executable, "-c"], block.text, reader.service())
        except AssertionError as error:
            raise AssertionError(f"{block.place}: {error}") from error


# ── How they are found ─────────────────────────────────────────────────────────────────────────────


def found(document: str) -> list[tuple[str, list[str]]]:
    return [(kind_of(block), commands(block.text)) for block in blocks("a.md", document)]


def test_commands_are_found_wherever_they_are() -> None:
    document = (
        "Say `make test ARGS=-q`, but not `make` or `n`.\n\n"
        "    # a comment\n    curl -s localhost:8000/info   # another\n\n    A=1 B='2 3' make serve\n\n"
        '    {"an": "answer"}\n\n'
        "```sh\npython -m x \\\n  --flag\n```\n```json\n{}\n```\n```python\nprint('a')\n```\n"
    )
    assert found(document) == [
        ("commands", ["make test ARGS=-q"]),
        ("commands", ["curl -s localhost:8000/info   # another", "A=1 B='2 3' make serve"]),
        ("shown", ['{"an": "answer"}']),
        ("commands", ["python -m x \\\n  --flag"]),
        ("shown", ["{}"]),
        ("python", ["print('a')"]),
    ]


def test_a_here_document_is_one_command() -> None:
    assert commands("cat > a <<EOF\nmake 'it\nEOF\nmake b") == ["cat > a <<EOF\nmake 'it\nEOF", "make b"]


def test_what_cannot_be_told_is_an_error() -> None:
    (block,) = blocks("a.md", "\n    frobnicate --all\n")
    with pytest.raises(ValueError, match=r"a\.md:2: is this a command"):
        kind_of(block)


@pytest.mark.parametrize("command", ["curl localhost:8000/info", "python -c 1", "ddpm generate", "sleep 1"])
def test_what_has_no_reason_not_to_run_runs(command: str) -> None:
    assert check_of(command) is None


@pytest.mark.parametrize(
    ("check", "right", "wrong"),
    [
        (check_make, "make test ARGS=x", "make tests"),
        (check_files, "docker compose -f docker-compose.yml up", "docker compose -f docker/none.yml up"),
        (
            check_files,
            "kubectl apply -k docker/kubernetes/overlays/cpu",
            "kubectl apply -k docker/kubernetes/overlays/tpu",
        ),
        (check_extras, "pip install 'ddpm-service[hub]'", "pip install 'ddpm-service[hubs]'"),
        (check_arguments, "python -m bench.loop --rounds 6", "python -m bench.loop --round-count 6"),
        (check_arguments, "python -m bench.loop", "python -m bench.loops"),
        (check_arguments, "python -m service --port 9000", "python -m service --ports 9000"),
    ],
)
def test_what_does_not_run_is_checked(check: Callable[[str], None], right: str, wrong: str) -> None:
    check(right)
    with pytest.raises((AssertionError, ModuleNotFoundError)):
        check(wrong)


@pytest.mark.parametrize(
    ("command", "flags"),
    [
        ("make serve", []),
        ("make serve ARGS='--port 9000 --model x'", ["--model", "x"]),
        (".venv/bin/python -m service --max-batch=4 --port=1", ["--max-batch=4"]),
    ],
)
def test_a_service_is_started_as_the_document_says(command: str, flags: list[str]) -> None:
    assert flags_of(command) == flags
