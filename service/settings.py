"""The only reader of the environment and the command line. Read once, checked, frozen, passed in."""

from __future__ import annotations

import re
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, SecretStr, ValidationError, field_validator
from pydantic_core import Url
from pydantic_settings import (
    BaseSettings,
    DotEnvSettingsSource,
    EnvSettingsSource,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

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
        pattern=r"^[^\x00]+$",
        description="model folder in diffusers layout, or hf:owner/name@revision on the Hugging Face Hub",
    )
    served_model_name: str = Field(
        "", pattern=r"^[^\x00-\x1f]*$", description="what clients call the model; its folder's name if empty"
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
    max_queue_per_key: int = Field(
        0,
        ge=0,
        description="images in flight of one key; 0 is 3/4 of max-queue with several keys, else all of it",
    )
    max_streams_per_key: int = Field(
        0, ge=0, description="open streams of one key; 0 is twice the images that it may have in flight"
    )
    max_images: int = Field(64, ge=1, description="images per request")
    policy: Literal["remaining", "fifo", "sharing"] = Field(
        "remaining",
        description="which jobs run next: least remaining work, order of arrival, or all by turns",
    )
    deadline_s: float = Field(300.0, gt=0, description="longest a request may take, in seconds")
    drain_s: float = Field(30.0, ge=0, description="seconds that running work gets after SIGTERM")
    stall_s: float = Field(60.0, gt=0, description="a step that takes longer counts as hung (/livez)")
    stream_grace_s: float = Field(10.0, ge=0, description="seconds a lost stream may be resumed for")
    resume_secret: SecretStr | None = Field(
        None,
        min_length=16,
        description="signs the ids of events: who has the same one can go on with another's lost streams",
    )
    result_ttl_s: float = Field(
        600.0, gt=0, description="seconds that results of Prefer: respond-async are kept for"
    )
    result_bytes: int = Field(
        64 << 20, ge=0, description="of the pixels of those results; the oldest are dropped first"
    )
    body_bytes: int = Field(
        256 << 20, ge=8 << 20, description="of all request bodies at once; more are refused with 429"
    )
    read_s: float = Field(
        30.0, gt=0, description="seconds for a request's head, and for a body beside its size at 16 KiB/s"
    )
    api_keys: Annotated[tuple[SecretStr, ...], NoDecode] = Field(
        (), description="accepted bearer keys, comma-separated; none leaves the service open"
    )
    allowed_hosts: Annotated[tuple[str, ...], NoDecode] = Field(
        (), description="names this may be called by (the Host header), comma-separated; * is any"
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

    @field_validator("api_keys", "allowed_hosts", "cors_origins", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        if isinstance(value, str):
            return tuple(part.strip() for part in value.split(",") if part.strip())
        return value

    @field_validator("api_keys", mode="before")
    @classmethod
    def _some_keys(cls, value: object) -> object:
        # Before `_split`: the last one in a class is the first to see a value.
        if isinstance(value, str) and not value.replace(",", "").strip():
            raise ValueError("there is no key in it, and without one the service would be open")
        return value

    @field_validator("root_path", mode="after")
    @classmethod
    def _unslashed(cls, value: str) -> str:
        return value.rstrip("/")

    @field_validator("allowed_hosts")
    @classmethod
    def _as_hosts_say(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for each in value:
            if not re.fullmatch(r"\*|(\*\.)?[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*|\[[0-9A-Fa-f:.]+\]", each):
                raise ValueError("a host is a name, *.name, or an address, without a port; an IPv6 one in []")
        return tuple(each.lower() for each in value)

    @field_validator("cors_origins")
    @classmethod
    def _as_browsers_say(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(origin(each) for each in value)

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],  # noqa: ARG003 (its base's signature)
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """The usual ones, but for variables that are a Kubernetes Service's and not ours."""
        assert isinstance(env_settings, EnvSettingsSource)
        env_settings.env_vars = {
            name: value for name, value in env_settings.env_vars.items() if not service_link(name, value)
        }
        return init_settings, env_settings, dotenv_settings, file_secret_settings

    @property
    def most_slots_of_a_key(self) -> int:
        """Of `max_queue`, how many one client may have: not all, where others are known to exist."""
        chosen = self.max_queue_per_key or (
            self.max_queue * 3 // 4 if len(self.api_keys) > 1 else self.max_queue
        )
        return max(1, min(chosen, self.max_queue))

    def engine_configs(self) -> list[EngineConfig]:
        """One for each device that is named."""
        values = {name: getattr(self, name) for name in SHARED}
        size = parse_size(self.sample_size) if self.sample_size else None
        return [
            EngineConfig(model=self.model, sample_size=size, device=device, slots=self.max_queue, **values)
            for device in self.device.split(",")
        ]


SHARED = ("runtime", "dtype", "max_batch", "policy", "batch_invariant", "log_format")


ELSEWHERE = frozenset({"DDPM_PUBLISH", "DDPM_URL", "DDPM_API_KEY"})
"""Read by docker-compose.yml, and by the client."""
LINK_NAME = re.compile(
    r"ddpm(_\w+)?_(service_(host|port(_\w+)?)|port_\d+_(tcp|udp|sctp)(_(proto|port|addr))?)"
)
LINK_VALUE = re.compile(r"(tcp|udp|sctp)://\S+:\d+")


def service_link(name: str, value: str | None) -> bool:
    """Whether a variable describes a Kubernetes Service whose name begins with `ddpm`.

    Pods get some for every Service of their namespace, `DDPM_PORT=tcp://10.0.0.1:8000` among them.
    """
    name = name.lower()
    address = name.endswith("_port") and LINK_VALUE.fullmatch(value or "") is not None
    return name.startswith("ddpm_") and (address or LINK_NAME.fullmatch(name) is not None)


def unknown_variables(settings: Settings) -> list[str]:
    """A line for each variable of the environment or `.env` that has our prefix and no meaning here."""
    known = {f"DDPM_{name}".upper() for name in Settings.model_fields} | ELSEWHERE
    found = {**DotEnvSettingsSource(Settings).env_vars, **EnvSettingsSource(Settings).env_vars}
    lines = []
    for name in sorted(each.upper() for each, value in found.items() if not service_link(each, value)):
        if name.startswith("DDPM_") and name not in known:
            near = get_close_matches(name, sorted(known), 1, cutoff=0.75)
            meant = f"; did you mean {near[0]}?" if near else ""
            lines.append(f"{name} is not a setting of this service{meant}")
    if "ddpm_api_key" in found and not settings.api_keys:
        lines.append("DDPM_API_KEY is the key that a client sends; without DDPM_API_KEYS the service is open")
    return lines


def origin(text: str) -> str:
    """An origin as browsers send it: lower case, punycode, neither default port nor final slash.

    `*` is any, `null` that of files and sandboxed frames. Raises ValueError for what is no origin.
    """
    if text in ("*", "null"):
        return text
    reason = "an origin is scheme://host or scheme://host:port, without a path"
    if "://" not in text:
        raise ValueError(reason)
    try:
        url = Url(text)
    except ValidationError:
        raise ValueError(reason) from None
    beside = url.username, url.password, url.query, url.fragment
    if (
        not url.host
        or "*" in url.host
        or url.path not in (None, "/")
        or any(part is not None for part in beside)
    ):
        raise ValueError(reason)
    return str(url).rstrip("/")


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
    except OSError as error:
        raise SettingsError(f"{error.filename}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise SettingsError(f"{Settings.model_config['env_file']}: not a text file in UTF-8") from error
