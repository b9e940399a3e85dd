"""An API key is in no log, no answer, no help and no traceback, whatever is sent, whatever goes wrong."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from fastapi import Request

from service.engine.messages import EngineConfig
from service.settings import SettingsError, read
from tests.service.live import Process, Serve, settings

KEY = "xK7-a-key-to-look-for"
WRONG = "xK7-a-wrong-key-to-look-for"
SECRETS = (KEY, WRONG)


def leaks(text: str) -> list[str]:
    """Which keys a text has."""
    return [secret for secret in SECRETS if secret in text]


def test_a_leak_is_found() -> None:
    assert leaks(f"Authorization: Bearer {KEY}") == [KEY]


@pytest.mark.parametrize("scheme", ["Bearer", "Basic"])
def test_neither_answers_nor_logs_have_a_key(
    serve: Serve, caplog: pytest.LogCaptureFixture, scheme: str
) -> None:
    caplog.set_level(logging.DEBUG)
    server = serve(api_keys=KEY, a1111=True)

    @server.app.get("/broken")
    async def broken(request: Request) -> None:
        raise RuntimeError("a bug")

    answers = []
    for key in SECRETS:
        headers = {"Authorization": f"{scheme} {key}", "Connection": "close"}  # as it is after a bug
        for path in ("/info", "/missing", "/broken", "/metrics", "/openapi.json", "/sdapi/v1/options"):
            answers.append(server.client.get(path, headers=headers))
        for path in ("/generate", "/edit", "/v1/images/generations", "/sdapi/v1/txt2img"):
            answers.append(server.client.post(path, json={"n": "x", "seed": []}, headers=headers))
    said = "".join(f"{answer.headers}{answer.text}" for answer in answers)
    wanted = {200, 401, 404, 422, 500} if scheme == "Bearer" else {200, 401}
    assert {answer.status_code for answer in answers} >= wanted
    assert leaks(said) == []
    ours = [record for record in caplog.records if not record.name.startswith(("httpcore", "httpx"))]
    assert ours  # a request each, and the traceback of the bug
    assert leaks("".join(f"{record.__dict__}{record.exc_text}" for record in ours)) == []


def test_settings_and_what_an_engine_is_started_with_do_not_show_a_key() -> None:
    chosen = settings(api_keys=KEY)
    engine: list[EngineConfig] = chosen.engine_configs()
    shown = f"{chosen!r}{chosen}{chosen.model_dump()}{chosen.model_dump_json()}{engine}"
    assert leaks(shown + msgspec.json.encode(engine).decode()) == []
    assert chosen.api_keys[0].get_secret_value() == KEY


def test_a_malformed_setting_beside_a_key_does_not_show_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DDPM_API_KEYS", KEY)
    monkeypatch.setenv("DDPM_MAX_QUEUE", "none")
    with pytest.raises(SettingsError) as found:
        read([])
    assert leaks("".join(traceback.format_exception(found.value))) == []


def test_a_process_does_not_print_its_key(launch: Callable[..., Process], tmp_path: Path) -> None:
    """Its help, a start that fails, and the warning about a misspelt variable."""
    help_of = launch("--help", DDPM_API_KEYS=KEY)
    refused = launch("--model", str(tmp_path), DDPM_API_KEYS=KEY, DDPM_API_KEYZ=WRONG)
    assert (help_of.wait(), refused.wait()) == (0, 3)
    assert "DDPM_API_KEYZ" in refused.log
    assert leaks(help_of.log + refused.log) == []
