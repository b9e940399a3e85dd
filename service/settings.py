"""The only reader of the environment and the command line. Read once, checked, frozen, passed in."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, SecretStr, ValidationError, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from model.unet_config import parse_size
from service.engine.messages import EngineConfig

INCLUDED = Path(__file__).resolve().parent.parent / "weights" / "fashion-mnist"
"""The model that comes with the service: `weights/` lies beside its packages, installed or not."""


class SettingsError(ValueError):
    """Some settings are malformed; the message has a line for each, which never repeats the value."""


class Settings(BaseSettings):
    """Every knob: `DDPM_<NAME>` in the environment or `.env`, or `--<name>` on the command line."""

    model_config = SettingsConfigDict(
        env_prefix="DDPM_",
        env_file=".env",
        frozen=True,
        extra="ignore",  # .env may hold other programs' variables
        cli_prog_name="python -m service",
        cli_kebab_case=True,
        cli_avoid_json=True,
        env_ignore_empty=True,
        allow_inf_nan=False,
    )

    model: str = Field(
        str(INCLUDED),
        description="model folder in diffusers layout, or hf:owner/name@revision on the Hugging Face Hub",
    )
    sample_size: str = Field(
        "",
        pattern=r"^([1-9]\d*(x[1-9]\d*)?)?$",
        description="HEIGHTxWIDTH of the pictures, or one number, for a model that does not say",
    )
    device: str = Field(
        "auto",
        pattern=r"^(auto|cpu|mps|cuda|cuda:\d+(,cuda:\d+)*)$",
        description="auto (every GPU, or else the CPU), cpu, mps, cuda, cuda:N, or several: cuda:0,cuda:1",
    )
    runtime: Literal["auto", "torch", "torch-compile", "openvino"] = Field(
        "auto", description="what runs the network"
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field("auto", description="its precision")
    host: str = Field("127.0.0.1", description="address to listen on")
    port: int = Field(8000, ge=0, le=65535, description="port to listen on; 0 picks a free one")
    root_path: str = Field(
        "",
        pattern=r"^(/[A-Za-z0-9._~-]+)*/?$",
        description="path that a proxy serves this below, such as /ddpm",
    )
    max_batch: int = Field(0, ge=0, le=4096, description="rows per network call; 0 follows the step times")
    max_queue: int = Field(256, ge=1, description="images in flight at once; more are refused with 429")
    max_images: int = Field(64, ge=1, description="images per request")
    policy: Literal["remaining", "fifo", "sharing"] = Field(
        "remaining",
        description="which jobs run next: least remaining work, order of arrival, or all by turns",
    )
    deadline_s: float = Field(300.0, gt=0, description="longest a request may take, in seconds")
    drain_s: float = Field(30.0, ge=0, description="seconds that running work gets after SIGTERM")
    stall_s: float = Field(60.0, gt=0, description="a step that takes longer counts as hung (/livez)")
    stream_grace_s: float = Field(10.0, ge=0, description="seconds a lost stream may be resumed for")
    result_ttl_s: float = Field(
        600.0, gt=0, description="seconds that results of Prefer: respond-async are kept for"
    )
    result_bytes: int = Field(
        64 << 20, ge=0, description="of the pixels of those results; the oldest are dropped first"
    )
    api_keys: Annotated[tuple[SecretStr, ...], NoDecode] = Field(
        (), description="accepted bearer keys, comma-separated; none leaves the service open"
    )
    cors_origins: Annotated[tuple[str, ...], NoDecode] = Field(
        (), description="origins whose pages may call, comma-separated"
    )
    a1111: bool = Field(False, description="serve AUTOMATIC1111's API too, below /sdapi/v1")
    log_format: Literal["text", "json"] = Field("text", description="how log lines look")
    access_log: bool = Field(True, description="log each request, but for health and metrics")
    batch_invariant: bool = Field(
        True,
        description="pad torch's batches, so that batch neighbours change nothing; without it, TF32 too",
    )

    @field_validator("api_keys", "cors_origins", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        if isinstance(value, str):
            return tuple(part.strip() for part in value.split(",") if part.strip())
        return value

    @field_validator("root_path", mode="after")
    @classmethod
    def _unslashed(cls, value: str) -> str:
        return value.rstrip("/")

    def engine_configs(self) -> list[EngineConfig]:
        """One for each device that is named."""
        values = {name: getattr(self, name) for name in SHARED}
        size = parse_size(self.sample_size) if self.sample_size else None
        return [
            EngineConfig(model=self.model, sample_size=size, device=device, slots=self.max_queue, **values)
            for device in self.device.split(",")
        ]


SHARED = ("runtime", "dtype", "max_batch", "policy", "batch_invariant", "log_format")


class CommandLine(Settings, cli_parse_args=True):
    """Start the service.

    Each option is also a variable of the environment, or a line in .env: --max-batch is DDPM_MAX_BATCH.

    Examples:
      ddpm serve                                   # http://127.0.0.1:8000, with the included model
      ddpm serve --model my-model --port 9000
      DDPM_API_KEYS=sesame ddpm serve --host 0.0.0.0
      ddpm serve --device cuda:0,cuda:1
    """


def read(arguments: Sequence[str] | None = None, program: str | None = None) -> Settings:
    """Read the environment and the command line. Raises SettingsError for malformed values.

    arguments: instead of those of the process. program: what its help calls it.
    """
    given = None if arguments is None else list(arguments)
    try:
        return CommandLine(_cli_parse_args=given, _cli_prog_name=program)
    except ValidationError as error:
        lines = [
            f"DDPM_{'.'.join(map(str, found['loc'])).upper()}: {found['msg']}"
            for found in error.errors(include_input=False)
        ]
        raise SettingsError("\n".join(lines)) from error
