"""The parser that is made from the commands, and what shells make of it."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from service import cli
from service.command_line import parser_of, script, subparsers
from service.settings import Settings


def completions(tmp_path: Path, *words: str) -> set[str]:
    """What bash offers for the last word."""
    (tmp_path / "ddpm.bash").write_text(
        script(parser_of(cli.Ddpm, "1").root_parser, "bash", {"serve": Settings})
    )
    program = """
        source "$1"; shift
        COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMPREPLY=()
        _shtab_ddpm ddpm "${COMP_WORDS[COMP_CWORD]}" "${COMP_WORDS[COMP_CWORD - 1]}"
        printf '%s\\n' "${COMPREPLY[@]}"
    """
    done = subprocess.run(
        ["bash", "-c", program, "bash", str(tmp_path / "ddpm.bash"), *words],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return set(done.stdout.split())


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (("ddpm", "s"), {"serve", "stream", "score"}),
        (("ddpm", "generate", "--sampler", "d"), {"ddpm", "ddim", "dpmpp_2m"}),
        (("ddpm", "generate", "--class"), {"--class-label", "--classifier-scale"}),
        (("ddpm", "generate", "--output", "pic"), {"picture.png"}),
        (("ddpm", "edit", "pic"), {"picture.png"}),
        (("ddpm", "serve", "--max-b"), {"--max-batch"}),
        (("ddpm", "serve", "--max-queue"), {"--max-queue", "--max-queue-per-key"}),
        (("ddpm", "serve", "--runtime", "torch-"), {"torch-compile"}),
    ],
)
def test_bash_completes(tmp_path: Path, words: tuple[str, ...], offered: set[str]) -> None:
    (tmp_path / "picture.png").touch()
    assert completions(tmp_path, *words) == offered


@pytest.mark.parametrize("shell", ["bash", "zsh", "tcsh"])
def test_every_shell_gets_a_script(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["completion", shell]) == 0
    said = capsys.readouterr().out
    assert "num-inference-steps" in said
    assert "max-batch" in said


def test_every_command_has_examples() -> None:
    root = parser_of(cli.Ddpm, "1").root_parser
    ours = {name: parser for name, parser in subparsers(root).items() if name not in cli.PROGRAMS}
    assert set(ours) == {"generate", "stream", "edit", "score", "info", "completion"}
    for name, parser in ours.items():
        assert f"\n  ddpm {name} " in str(parser.epilog) or f"(ddpm {name} " in str(parser.epilog)
        assert "Examples" not in str(parser.description)
