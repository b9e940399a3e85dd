"""The command `ddpm`, mostly in this process; as a process where that is what is tested."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import PIL.Image
import pytest
from rich.console import Console

from service import __version__, cli
from service.client import Client, Event, Image, Queued
from tests.service.fakes import SIZE, until
from tests.service.live import ROOT, Serve, Threaded, serving

Run = Callable[..., int]


@pytest.fixture(scope="module")
def server() -> Iterator[Threaded]:
    started = serving()
    yield next(started)(stream_grace_s=0.0)
    next(started, None)


@pytest.fixture
def ddpm(server: Threaded, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """Runs the command in an empty folder, against the server."""
    monkeypatch.setenv("DDPM_URL", server.url)
    monkeypatch.delenv("DDPM_API_KEY", raising=False)
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: cli.main([str(each) for each in arguments])


@pytest.fixture
def grey(tmp_path: Path) -> Path:
    path = tmp_path / "grey.png"
    PIL.Image.new("L", (SIZE, SIZE), 100).save(path)
    return path


Printed = pytest.CaptureFixture[str]


def parameters(path: Path | BytesIO) -> dict[str, Any]:
    """Those that a PNG file carries."""
    with PIL.Image.open(path) as image:
        found: dict[str, Any] = json.loads(image.info["parameters"])
    return found


def test_an_image(ddpm: Run, capsys: Printed) -> None:
    options = ["-c", "dog", "--seed", 7, "--steps", 5, "--sampler", "ddim", "--guidance-scale", 1.5]
    assert ddpm("generate", *options, "-o", "dog.png") == 0
    assert capsys.readouterr().out == "dog.png\n"
    found = parameters(Path("dog.png"))
    wanted = {"seed": 7, "class_label": "dog", "num_inference_steps": 5, "sampler": "ddim"}
    assert found.items() >= {**wanted, "guidance_scale": 1.5}.items()


def test_a_class_by_its_index(ddpm: Run) -> None:
    assert ddpm("generate", "-c", "1", "-o", "dog.png") == 0
    assert parameters(Path("dog.png"))["class_label"] == "dog"


def test_images_get_names(ddpm: Run, capsys: Printed) -> None:
    assert ddpm("generate", "-n", 2, "--seed", 3, "-c", "Ankle Boot") == 0
    assert ddpm("generate", "-n", 2, "--seed", 3, "-o", "some/x.jpg", "--output-format", "jpeg") == 0
    assert ddpm("generate", "--seed", 3, "-o", "folder/new") == 0
    assert capsys.readouterr().out.splitlines() == [
        "tiny-Ankle-Boot-3.png",
        "tiny-Ankle-Boot-4.png",
        "some/x-3.jpg",
        "some/x-4.jpg",
        "folder/new/tiny-3.png",
    ]
    assert Path("some/x-4.jpg").read_bytes().startswith(b"\xff\xd8\xff")  # as JPEG files do


def test_a_class_cannot_lead_out_of_the_folder() -> None:
    image = Image(0, 7, "../../etc", b"", "image/png")
    assert cli.place(None, "m", image, 1) == Path("m-.._.._etc-7.png")


def test_standard_output(ddpm: Run, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    assert ddpm("generate", "--seed", 7, "-o", "-") == 0
    assert parameters(BytesIO(capfdbinary.readouterr().out))["seed"] == 7
    assert ddpm("generate", "-n", 2, "-o", "-") == 2


def test_a_stream_that_is_not_watched_in_a_terminal(ddpm: Run, capsys: Printed) -> None:
    assert ddpm("stream", "--steps", 5, "--preview-every", 1, "--seed", 1, "-o", "x.png") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("queued: 0 ahead")
    assert lines[1].startswith("step 1/5: ")
    assert lines[-2].startswith("completed in ")
    assert lines[-1] == "x.png"
    assert parameters(Path("x.png"))["seed"] == 1


def test_an_edit(ddpm: Run, grey: Path, capsys: Printed) -> None:
    PIL.Image.new("L", (SIZE, SIZE), 255).save("mask.png")
    assert ddpm("edit", grey, "--strength", 0.5, "--mask", "mask.png", "--seed", 1) == 0
    (path,) = capsys.readouterr().out.splitlines()
    assert path == "grey-edited-1.png"
    assert parameters(Path(path)).items() >= {"strength": 0.5, "masked": True}.items()


def test_scores(ddpm: Run, grey: Path, capsys: Printed) -> None:
    assert ddpm("score", grey, grey, "--terms", 5) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith(f"{grey}: ")
    assert " bits/dim" in lines[0]
    assert ddpm("score", grey, "--terms", 5, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found["scores"][0]["terms"]) == 5


def test_what_a_service_offers(ddpm: Run, capsys: Printed) -> None:
    assert ddpm("info") == 0
    said = capsys.readouterr().out
    assert said.startswith(f"tiny: {SIZE} × {SIZE}, 1 channels\n")
    assert "classes    3: cat, dog, Ankle Boot\n" in said
    assert ddpm("info", "--json") == 0
    assert json.loads(capsys.readouterr().out)["model"]["name"] == "tiny"


def test_what_a_model_is(ddpm: Run, tiny_folder: Path, capsys: Printed) -> None:
    assert ddpm("info", tiny_folder, "--json") == 0
    assert json.loads(capsys.readouterr().out)["shape"] == [1, SIZE, SIZE]
    assert ddpm("info", "nowhere") == 3
    assert "no such folder" in capsys.readouterr().err


# ── What goes wrong ────────────────────────────────────────────────────────────────────────────


def test_an_error_of_the_service_is_a_line_and_code_1(ddpm: Run, capsys: Printed) -> None:
    assert ddpm("generate", "-c", "unicorn") == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("Unknown class.")


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ([], "usage: ddpm"),
        (["bake"], "invalid choice: 'bake'"),
        (["generate", "--sed", "7"], "unrecognized arguments: --sed"),
        (["generate", "--seed", "x"], "seed: Input should be a valid integer"),
        (["generate", "--sampler", "euler"], "invalid choice: 'euler'"),
        (["edit"], "required: IMAGE"),
        (["edit", "nowhere.png"], "image: Path does not point to a file"),
        (["completion", "fish"], "shell: Input should be 'bash'"),
    ],
)
def test_a_command_line_that_cannot_be_understood_is_code_2(
    ddpm: Run, capsys: Printed, arguments: list[str], reason: str
) -> None:
    assert ddpm(*arguments) == 2
    assert reason in capsys.readouterr().err


def test_a_request_that_is_tried_again_is_announced(
    serve: Serve, ddpm: Run, capsys: Printed, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = serve(max_queue=1)
    server.gate.shut()
    with server.client.stream("GET", "/stream") as taken:
        lines = taken.iter_lines()
        assert next(lines) == "event: queued"

        def sleep(_: float) -> None:
            server.gate.open()
            assert "event: completed" in list(lines)

        monkeypatch.setattr("tenacity.nap.time", SimpleNamespace(sleep=sleep))
        assert ddpm("generate", "--url", server.url, "--seed", 1) == 0
    assert "queue_full" in capsys.readouterr().err


def test_an_interrupted_stream_cancels_its_job_and_no_other(
    ddpm: Run, server: Threaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown, cancelled = [], []

    def interrupt(events: Iterator[Event], _: Console) -> None:
        shown.append(next(events))
        raise KeyboardInterrupt

    monkeypatch.setattr("service.terminal.show", interrupt)
    monkeypatch.setattr(Client, "cancel", lambda _, job_id: cancelled.append(job_id))
    assert ddpm("stream") == 130
    (first,) = shown
    assert isinstance(first, Queued)
    assert cancelled == [first.id]


# ── Programs ───────────────────────────────────────────────────────────────────────────────────


WANTED = {
    "serve": "--max-batch",
    "inspect": "--sample-size",
    "convert": "--beta-schedule",
    "train": "--data",
    "evaluate": "--model",
}


@pytest.mark.parametrize("name", WANTED)
def test_a_program_has_its_own_help(ddpm: Run, capsys: Printed, name: str) -> None:
    assert ddpm(name, "--help") == 0
    assert WANTED[name] in capsys.readouterr().out


def test_a_program_s_exit_code_is_the_command_s(ddpm: Run, capsys: Printed) -> None:
    assert ddpm("convert", "nowhere.pt", "out") == 3
    assert ddpm("inspect", "nowhere") == 3
    assert ddpm("train", "--bogus") == 2


@pytest.mark.parametrize(
    ("module", "said"),
    [
        ("tqdm", "ddpm train needs tqdm: pip install 'ddpm-service[train]'"),
        ("model.training", "ddpm train: this installation does not include model.training"),
    ],
)
def test_what_is_not_installed_is_named(
    ddpm: Run, capsys: Printed, monkeypatch: pytest.MonkeyPatch, module: str, said: str
) -> None:
    def missing(_: str) -> Any:
        raise ModuleNotFoundError(f"No module named {module!r}", name=module)

    monkeypatch.setattr("service.cli.importlib", SimpleNamespace(import_module=missing))
    assert ddpm("train") == 1
    assert capsys.readouterr().err == f"{said}\n"


# ── Processes ──────────────────────────────────────────────────────────────────────────────────


def command(*arguments: str, **options: Any) -> subprocess.Popen[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT), **options.pop("env", {})}
    line = [sys.executable, "-P", "-m", "service.cli", *arguments]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(line, text=True, env=env, **pipes, **options)


def test_help_teaches_by_examples_and_is_light() -> None:
    program = (
        "import sys\nfrom service.cli import main\n"
        "assert main(['generate', '--help']) == main(['--help']) == 0\n"
        "heavy = {'torch', 'fastapi', 'numpy', 'PIL', 'msgspec'} & sys.modules.keys()\n"
        "sys.exit(', '.join(heavy) or None)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, timeout=60, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert '  ddpm generate -c "ankle boot" -o boot.png\n' in done.stdout


def test_the_version() -> None:
    process = command("--version")
    assert process.communicate(timeout=60)[0] == f"ddpm {__version__}\n"


def test_ctrl_c_cancels_the_job(serve: Serve) -> None:
    server = serve(stream_grace_s=0.0)
    server.gate.shut()
    process = command("stream", "--url", server.url)
    assert process.stdout is not None
    assert process.stdout.readline().startswith("queued")
    server.gate.wait_for_arrival(1)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    process.communicate()
    server.gate.open()
    until(lambda: server.metric("ddpm_cancelled_total") == 1, "the cancellation")


@pytest.mark.slow
def test_the_service_starts_in_any_folder(tiny_folder: Path, tmp_path: Path) -> None:
    """Also where modules of the same names lie about."""
    for name in ("model", "service"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('the wrong module')")
    flags = "--model", str(tiny_folder), "--runtime", "torch", "--max-batch", "1", "--port", "0"
    process = command("serve", *flags, cwd=tmp_path, env={"DDPM_MODEL": ""})
    assert process.stderr is not None
    try:
        for line in process.stderr:
            assert "wrong module" not in line
            if "results independent of batch neighbours" in line:
                break
        else:
            pytest.fail("the service ended")
        process.terminate()
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.communicate()
