"""One reader of the environment and the command line; a bad value stops the start-up."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import psutil
import pytest
from pydantic import SecretStr, ValidationError

from service.settings import (
    CommandLine,
    Settings,
    SettingsError,
    read,
    service_link,
    unknown_variables,
)
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


# ── Origins ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("given", "sent_by_browsers"),
    [
        ("https://a.example", "https://a.example"),
        ("https://a.example/", "https://a.example"),
        ("HTTPS://A.Example:443", "https://a.example"),
        ("http://a.example:80", "http://a.example"),
        ("http://a.example:8080/", "http://a.example:8080"),
        ("http://[::1]:3000", "http://[::1]:3000"),
        ("https://bücher.example", "https://xn--bcher-kva.example"),
        ("*", "*"),
        ("null", "null"),
    ],
)
def test_an_origin_is_as_browsers_send_it(
    monkeypatch: pytest.MonkeyPatch, given: str, sent_by_browsers: str
) -> None:
    monkeypatch.setenv("DDPM_CORS_ORIGINS", given)
    assert Settings().cors_origins == (sent_by_browsers,)


@pytest.mark.parametrize(
    "given",
    [
        "a.example",
        "localhost:3000",
        "//a.example",
        "https://",
        "https://a.example/page",
        "https://a.example?",
        "https://a.example#b",
        "https://*.example",
        "https://me@a.example",
    ],
)
def test_what_is_no_origin_is_refused(monkeypatch: pytest.MonkeyPatch, given: str) -> None:
    monkeypatch.setenv("DDPM_CORS_ORIGINS", given)
    with pytest.raises(ValidationError, match="an origin is scheme://host"):
        Settings()


# ── Keys and hosts ─────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("given", [",", " , ", " "])
def test_a_list_without_a_key_does_not_leave_the_service_open(
    monkeypatch: pytest.MonkeyPatch, given: str
) -> None:
    monkeypatch.setenv("DDPM_API_KEYS", given)
    with pytest.raises(SettingsError, match=r"^DDPM_API_KEYS: .*there is no key in it"):
        read([])


def test_hosts_are_names_or_addresses_without_a_port(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DDPM_ALLOWED_HOSTS", "Ddpm.example.org, *.lan,10.0.0.1,[fd00::1],*")
    assert Settings().allowed_hosts == ("ddpm.example.org", "*.lan", "10.0.0.1", "[fd00::1]", "*")
    for malformed in ("a.example:8000", "https://a.example", "a.*", "fd00::1", "a b"):
        monkeypatch.setenv("DDPM_ALLOWED_HOSTS", malformed)
        with pytest.raises(SettingsError, match=r"^DDPM_ALLOWED_HOSTS: "):
            read([])


@pytest.mark.parametrize("content", [b"DDPM_PORT=\xff\xfe", b"DDPM_MODEL=a\0b"])
def test_a_binary_file_is_one_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / ".env").write_bytes(content)
    with pytest.raises(SettingsError) as found:
        read([])
    assert "\n" not in str(found.value)


def test_a_file_that_cannot_be_read_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("DDPM_PORT=9001")

    def unreadable(*_: object, **__: object) -> None:  # permissions do not stop root
        raise PermissionError(13, "Permission denied", ".env")

    monkeypatch.setattr("dotenv.main.open", unreadable, raising=False)
    with pytest.raises(SettingsError, match=r"^\.env: cannot be read \(Permission denied\)$"):
        read([])


# ── Variables with our prefix that are no settings ────────────────────────────────────────────────

LINKS = {
    "DDPM_SERVICE_HOST": "10.96.0.1",
    "DDPM_SERVICE_PORT": "8000",
    "DDPM_SERVICE_PORT_HTTP": "8000",
    "DDPM_PORT": "tcp://10.96.0.1:8000",
    "DDPM_PORT_8000_TCP": "tcp://10.96.0.1:8000",
    "DDPM_PORT_8000_TCP_PROTO": "tcp",
    "DDPM_PORT_8000_TCP_PORT": "8000",
    "DDPM_PORT_8000_TCP_ADDR": "10.96.0.1",
    "DDPM_API_PORT": "tcp://[fd00::1]:80",
    "DDPM_API_SERVICE_HOST": "fd00::1",
    "DDPM_API_V2_PORT_53_UDP_ADDR": "10.96.0.1",
}
"""What Kubernetes sets for Services that are called ddpm, ddpm-api and ddpm-api-v2."""


def test_the_variables_of_a_kubernetes_service_are_not_ours(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name, value in LINKS.items():
        monkeypatch.setenv(name, value)
    assert Settings().port == 8000
    assert unknown_variables(Settings()) == []
    (tmp_path / ".env").write_text("DDPM_PORT=9001\n")
    assert Settings().port == 9001


@pytest.mark.parametrize(
    ("name", "value"),
    [("DDPM_PORT", "9000"), ("DDPM_PORT", "http://a:80"), ("DDPM_HOST", "tcp://a:80"), ("DDPM_MODEL", "x")],
)
def test_a_setting_is_not_taken_for_a_service(name: str, value: str) -> None:
    assert not service_link(name, value)


def test_a_variable_without_a_meaning_is_named_with_the_nearest(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("DDPM_MAX_BACH", "DDPM_PUBLISH", "DDPM_URL", "DDPM_API_KEYS", "DDPM_API_KEY", "DDPMAX"):
        monkeypatch.setenv(name, "7")
    (tmp_path / ".env").write_text("DDPM_SOMETHING_QUITE_DIFFERENT=7\nSOMEONE_ELSES=7\n")
    assert unknown_variables(Settings()) == [
        "DDPM_MAX_BACH is not a setting of this service; did you mean DDPM_MAX_BATCH?",
        "DDPM_SOMETHING_QUITE_DIFFERENT is not a setting of this service",
    ]


def test_the_key_of_a_client_protects_no_service(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DDPM_API_KEY", "sesame")
    (line,) = unknown_variables(Settings())
    assert "without DDPM_API_KEYS the service is open" in line
    assert "sesame" not in line
    assert unknown_variables(Settings(api_keys=(SecretStr("sesame"),))) == []


# ── The whole program ──────────────────────────────────────────────────────────────────────────


def test_a_malformed_value_gives_one_line_and_code_2(launch: Callable[..., Process]) -> None:
    process = launch(DDPM_MAX_QUEUE="many")
    assert process.wait() == 2
    (line,) = process.lines
    assert line.startswith("DDPM_MAX_QUEUE: ")
    assert "many" not in line


def test_a_misspelt_variable_is_logged_and_a_service_called_ddpm_is_not(
    launch: Callable[..., Process], tmp_path: Path
) -> None:
    process = launch("--model", str(tmp_path / "nowhere"), DDPM_MAX_QUEU="7", **LINKS)
    assert process.wait() == 3
    warning, reason = process.lines
    assert warning.endswith("DDPM_MAX_QUEU is not a setting of this service; did you mean DDPM_MAX_QUEUE?")
    assert reason.endswith("no such folder")


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
