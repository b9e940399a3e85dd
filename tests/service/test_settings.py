"""One reader of the environment and the command line; a bad value stops the start-up."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import psutil
import pytest
from pydantic import SecretStr, ValidationError

from service.settings import CommandLine, Settings
from tests.model.hub_server import REPOSITORY, Hub, files_of, serving
from tests.service.fakes import until
from tests.service.live import ROOT, Process


@pytest.fixture(autouse=True)
def bare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No variables of ours, no .env, no arguments."""
    for name in Settings.model_fields:
        monkeypatch.delenv(f"DDPM_{name.upper()}", raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["service"])


def test_the_defaults() -> None:
    settings = Settings()
    assert (settings.port, settings.host, settings.max_queue) == (8000, "127.0.0.1", 256)
    assert Path(settings.model) == ROOT / "weights" / "fashion-mnist"  # wherever it is started
    assert (settings.runtime, settings.device, settings.dtype) == ("auto", "auto", "auto")
    assert settings.api_keys == ()


def test_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "DDPM_PORT": "9000",
        "DDPM_RUNTIME": "torch",
        "DDPM_API_KEYS": " one, two,,",
        "DDPM_CORS_ORIGINS": "https://a.example",
        "DDPM_BATCH_INVARIANT": "false",
        "DDPM_MAX_QUEUE": "",
    }.items():
        monkeypatch.setenv(name, value)
    settings = Settings()
    assert (settings.port, settings.runtime, settings.batch_invariant) == (9000, "torch", False)
    assert [key.get_secret_value() for key in settings.api_keys] == ["one", "two"]
    assert settings.cors_origins == ("https://a.example",)
    assert settings.max_queue == 256  # an empty variable says nothing


def test_a_file(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("DDPM_PORT=9001\nSOMEONE_ELSES=7\nDDPM_UNKNOWN=7\n")
    assert Settings().port == 9001


def test_flags_beat_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DDPM_PORT", "9000")
    monkeypatch.setenv("DDPM_HOST", "::1")
    monkeypatch.setattr("sys.argv", ["service", "--port", "9002", "--max-queue=7", "--api-keys", "one,two"])
    settings = CommandLine()
    assert (settings.port, settings.host, settings.max_queue) == (9002, "::1", 7)
    assert [key.get_secret_value() for key in settings.api_keys] == ["one", "two"]


def test_keys_are_not_shown() -> None:
    assert "sesame" not in repr(Settings(api_keys=(SecretStr("sesame"),)))


def test_settings_do_not_change() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        Settings().port = 1  # type: ignore[misc]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("PORT", "eighty"),
        ("PORT", "65536"),
        ("RUNTIME", "tensorflow"),
        ("DEVICE", "banana"),
        ("MAX_QUEUE", "0"),
        ("DEADLINE_S", "nan"),
        ("DEADLINE_S", "inf"),
        ("DRAIN_S", "-1"),
        ("LOG_FORMAT", "xml"),
        ("BATCH_INVARIANT", "perhaps"),
        ("SAMPLE_SIZE", "0"),
        ("SAMPLE_SIZE", "64x"),
        ("SAMPLE_SIZE", "64 x 128"),
        ("SAMPLE_SIZE", "64x128x3"),
    ],
)
def test_a_malformed_value_is_refused(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(f"DDPM_{name}", value)
    with pytest.raises(ValidationError) as refused:
        Settings()
    assert [found["loc"] for found in refused.value.errors()] == [(name.lower(),)]


@pytest.mark.parametrize(
    ("text", "size"), [("", None), ("32", (32, 32)), ("64x128", (64, 128)), ("1x1", (1, 1))]
)
def test_a_size_is_a_height_and_a_width(text: str, size: tuple[int, int] | None) -> None:
    assert [config.sample_size for config in Settings(sample_size=text).engine_configs()] == [size]


# ── The whole program ──────────────────────────────────────────────────────────────────────────


def test_a_malformed_value_gives_one_line_and_code_2(launch: Callable[..., Process]) -> None:
    process = launch(DDPM_MAX_QUEUE="many")
    assert process.wait() == 2
    (line,) = process.lines
    assert line.startswith("DDPM_MAX_QUEUE: ")
    assert "many" not in line


def test_an_unusable_model_gives_one_line_and_code_3(launch: Callable[..., Process], tmp_path: Path) -> None:
    process = launch("--model", str(tmp_path / "nowhere"))
    assert process.wait() == 3
    assert process.lines == [f"{tmp_path / 'nowhere'}: no such folder"]


def test_a_device_that_is_not_there_gives_one_line_and_code_3(
    launch: Callable[..., Process], tiny_folder: Path
) -> None:
    process = launch("--model", str(tiny_folder), "--device", "cuda:63")
    assert process.wait() == 3
    (line,) = process.lines
    assert line.startswith("device 'cuda:63': ")


def test_weights_that_were_tampered_with_are_not_served(
    launch: Callable[..., Process], tiny_folder: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    for path in [path for path in tiny_folder.rglob("*") if path.is_file()]:
        (copy / path.relative_to(tiny_folder)).parent.mkdir(parents=True, exist_ok=True)
        (copy / path.relative_to(tiny_folder)).write_bytes(path.read_bytes())
    weights = copy / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    process = launch("--model", str(copy))
    assert process.wait() == 3
    (line,) = process.lines
    assert str(weights) in line
    assert "sha256" in line


@pytest.mark.slow
def test_a_model_of_the_hub_is_served_and_an_engine_that_is_replaced_has_the_same_commit(
    launch: Callable[..., Process], tiny_folder: Path, tmp_path: Path
) -> None:
    hub = Hub({"a" * 40: files_of(tiny_folder)}, {"main": "a" * 40})
    with serving(hub):
        flags = "--runtime", "torch", "--max-batch", "1"  # which are soon ready
        process = launch(*flags, DDPM_MODEL=f"hf:{REPOSITORY}", HF_ENDPOINT=hub.url, HF_HOME=str(tmp_path))
        with closing(process.connect()) as client:
            assert client.get("/info").json()["model"]["name"] == "tiny-cats"
            hub.branches["main"] = "b" * 40  # which would fail
            before = len(hub.requests)
            (engine,) = psutil.Process(process.popen.pid).children()
            engine.kill()
            until(lambda: "the engine has ended" in process.log, "the death to be noticed")
            until(lambda: client.get("/readyz").status_code == 200, "another engine")
        assert len(hub.requests) == before


def test_a_repository_that_is_not_there_gives_one_line_and_code_3(
    launch: Callable[..., Process], tmp_path: Path
) -> None:
    with serving(Hub({}, {})) as hub:
        process = launch("--model", "hf:someone/else", HF_ENDPOINT=hub.url, HF_HOME=str(tmp_path))
        assert process.wait() == 3
    assert process.lines == ["hf:someone/else: no such repository, or a private one, which needs HF_TOKEN"]
