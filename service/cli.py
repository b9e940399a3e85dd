"""The command `ddpm`: start the service, call one that runs, convert and train models.

Exit codes: 0, 1 for an error of the service or of a file, 2 for a command line that cannot be understood,
130 for Ctrl-C; `serve`, `inspect`, `convert`, `train` and `evaluate` have those of the programs that
they are.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Sequence
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import Any, Literal

from pydantic import AliasChoices, BaseModel, Field, FilePath, ValidationError
from pydantic_settings import (
    BaseSettings,
    CliApp,
    CliPositionalArg,
    CliSubCommand,
    SettingsConfigDict,
    SettingsError,
)
from stamina.instrumentation import RetryDetails, set_on_retry_hooks

from service import __version__
from service.client import Client, ClientError, Image, Queued
from service.client.fields import Format, Sampler, Shown, Spacing
from service.command_line import parser_of, script

PROGRAMS = {
    "serve": "service.__main__",
    "inspect": "model.inspect",
    "convert": "model.convert.__main__",
    "train": "model.training.train",
    "evaluate": "model.evaluation.evaluate",
}
"""Commands that are programs of their own, with their own options: everything behind the name is theirs."""
NOT_SENT = {"url", "output", "as_json"}
"""Options that are no fields of the API."""
INTERRUPTED = 130


class UsageError(Exception):
    """Options that do not go together."""


class Remote(BaseModel):
    """What every command has that calls a service."""

    url: str | None = Field(
        None, description="where the service is; else DDPM_URL, else http://127.0.0.1:8000"
    )

    def client(self) -> Client:
        """A client of it. Its key is that of DDPM_API_KEY: an option would be seen by others."""
        return Client(self.url)


class Job(Remote):
    """Options of every command that computes."""

    seed: int | None = Field(None, description="seed of the first image, with which it comes out the same")
    class_label: str | None = Field(
        None,
        validation_alias=AliasChoices("class_label", "c"),
        description="name or index of a class; ddpm info lists them",
    )
    deadline_s: float | None = Field(None, description="give up after so many seconds")

    def fields(self) -> dict[str, Any]:
        """Those that were given, by the names of the API."""
        found = self.model_dump(exclude_unset=True, exclude=NOT_SENT, mode="json")
        label = found.get("class_label")
        if label is not None and label.isascii() and label.isdigit():
            found["class_label"] = int(label)
        return found


class Sampled(Job):
    """Options of every command that makes images."""

    n: int = Field(1, description="how many images; image i has the seed + i")
    num_inference_steps: int | None = Field(
        None,
        validation_alias=AliasChoices("num_inference_steps", "steps"),
        description="denoising steps",
    )
    sampler: Sampler | None = Field(None, description="which reverse process")
    eta: float | None = Field(None, description="η of ddim, 0 to 1")
    guidance_scale: float | None = Field(None, description="classifier-free guidance; 1 is none")
    guidance_rescale: float | None = Field(None, description="0 to 1: against strong colours")
    guidance_sigma_min: float | None = Field(None, description="lowest noise level that is guided")
    guidance_sigma_max: float | None = Field(None, description="highest one")
    classifier_scale: float | None = Field(None, description="guidance by a classifier")
    timestep_spacing: Spacing | None = Field(None, description="which timesteps the steps are at")
    scale: int | None = Field(None, description="enlarge pictures by this factor")
    output_format: Format | None = Field(None, description="of the files")
    output: Path | None = Field(
        None,
        validation_alias=AliasChoices("output", "o"),
        description="file or folder to write; - is standard output",
    )

    def save(self, images: Sequence[Image], name: str) -> None:
        """Write the images, and print where each is. name: that of a file begins with it."""
        if self.output == Path("-"):
            if len(images) != 1:
                raise UsageError("--output -: only one image can be written to standard output")
            sys.stdout.buffer.write(images[0].data)
            return
        for image in images:
            path = place(self.output, name, image, len(images))
            path.parent.mkdir(parents=True, exist_ok=True)
            image.save(path)
            say(path)


class Generate(Sampled):
    """Make images from noise, and write them to files.

    Examples:
      ddpm generate -c bag -o bag.png
      ddpm generate -c "ankle boot" -n 8 --seed 7 -o boots/
      ddpm generate --sampler ddim --steps 50 --scale 8
      ddpm generate -c bag -o - | display
    """

    def cli_cmd(self) -> None:
        """Run it."""
        with self.client() as client:
            result = client.generate(**self.fields())
        self.save(result.images, result.model)


class Stream(Sampled):
    """Watch images being made: in a terminal as pictures, elsewhere a line for each event.

    Examples:
      ddpm stream -c sneaker
      ddpm stream -n 4 --sampler ddpm --steps 250 --seed 7
      ddpm stream -c bag --preview xt -o bag.png
    """

    preview: Shown | None = Field(None, description="the x₀ prediction (x0), the noisy sample (xt), or both")
    preview_every: int | None = Field(None, description="steps between two pictures")

    def cli_cmd(self) -> None:
        """Run it. Ctrl-C cancels the job."""
        from rich.console import Console

        from service.terminal import show

        job_id = ""
        with self.client() as client:
            try:
                # Models whose samples are no pictures are shown channel by channel.
                events = client.stream(**{"output_format": "png", **self.fields()})
                first = next(events)
                assert isinstance(first, Queued)
                job_id = first.id
                result = show(chain([first], events), Console(stderr=self.output == Path("-")))
            except KeyboardInterrupt:
                with suppress(ClientError):
                    client.cancel(job_id)
                raise
        if self.output is not None:
            self.save(result.images, result.model)


class Edit(Sampled):
    """Change a picture: all of it, or where a mask is white.

    Examples:
      ddpm edit boot.png --strength 0.6 -c sneaker -o sneaker.png
      ddpm edit boot.png --mask right.png -n 4 -o halves/
    """

    image: CliPositionalArg[FilePath] = Field(description="PNG, JPEG, WebP or .npy")
    mask: FilePath | None = Field(None, description="a picture of the same size: white is regenerated")
    strength: float | None = Field(None, description="how much changes, 0 to 1")
    jump_length: int | None = Field(None, description="steps that a RePaint jump goes back")
    jump_n_sample: int | None = Field(None, description="how often each section is run")

    def cli_cmd(self) -> None:
        """Run it."""
        with self.client() as client:
            result = client.edit(**self.fields())
        self.save(result.images, f"{self.image.stem}-edited")


class Score(Job):
    """Say how likely and how typical pictures are, in bits per dimension.

    Examples:
      ddpm score boot.png bag.png
      ddpm score boot.png --terms 1000 --json
    """

    images: CliPositionalArg[list[FilePath]] = Field(description="1 to 8 PNG, JPEG, WebP or .npy files")
    terms: int | None = Field(None, description="timesteps to evaluate of each picture")
    as_json: bool = Field(False, validation_alias=AliasChoices("json"), description="for programs")

    def cli_cmd(self) -> None:
        """Run it."""
        with self.client() as client:
            result = client.score(**self.fields())
        if self.as_json:
            rows = [
                {name: value for name, value in vars(each).items() if name != "guesses"}
                for each in result.scores
            ]
            say(json.dumps({"model": result.model, "scores": rows, "parameters": result.parameters}))
            return
        for path, score in zip(self.images, result.scores, strict=True):
            line = f"{path}: {score.bits_per_dim:.3f} ± {score.standard_error:.3f} bits/dim"
            if score.typicality is not None:
                line += f", less typical than {score.typicality['percentile']:.0f} % of training images"
            say(line)


class Info(Remote):
    """Say what a running service offers, or what a model on disk or on the Hub is.

    Examples:
      ddpm info
      ddpm info --json
      ddpm info weights/fashion-mnist
      ddpm info hf:google/ddpm-cifar10-32
    """

    model: CliPositionalArg[str | None] = Field(
        None, description="a model folder or file, or hf:owner/name; absent: the service is asked"
    )
    sample_size: str | None = Field(None, description="HEIGHTxWIDTH, for a model that does not say")
    as_json: bool = Field(False, validation_alias=AliasChoices("json"), description="for programs")

    def cli_cmd(self) -> None:
        """Run it."""
        if self.model is not None:
            options = ["--sample-size", self.sample_size] if self.sample_size else []
            sys.exit(run_program("model.inspect", [self.model, *options, *["--json"] * self.as_json]))
        from service.terminal import summary

        with self.client() as client:
            found = client.info()
        say(json.dumps(found, ensure_ascii=False, indent=2) if self.as_json else summary(found))


class Program(BaseModel):
    """A command that is a program of its own: `main` runs it before anything is parsed here."""

    arguments: CliPositionalArg[list[str]] = Field([], description="options of the program; see its --help")


class Completion(BaseModel):
    """Print what makes a shell complete commands and options.

    Examples:
      eval "$(ddpm completion bash)"
      ddpm completion zsh > ~/.zfunc/_ddpm
    """

    shell: CliPositionalArg[Literal["bash", "zsh", "tcsh"]] = Field(description="which shell")

    def cli_cmd(self) -> None:
        """Run it."""
        from service.settings import Settings

        parser = parser_of(Ddpm, __version__).root_parser
        say(script(parser, self.shell, {"serve": Settings}))


class Ddpm(BaseSettings):
    """Serve diffusion models over HTTP, and make pictures with a service that runs.

    Examples:
      ddpm serve                                    # http://127.0.0.1:8000, with the included model
      ddpm generate -c "ankle boot" -o boot.png
      ddpm stream -c sneaker -n 3                   # watch three pictures sharpen in the terminal
      ddpm info                                     # classes, samplers, defaults
      DDPM_URL=https://ddpm.example ddpm generate   # a service elsewhere; its key: DDPM_API_KEY
    """

    model_config = SettingsConfigDict(
        env_prefix="DDPM_COMMAND_",  # else a variable GENERATE of somebody else's would be read
        cli_prog_name="ddpm",
        cli_kebab_case=True,
        cli_implicit_flags="toggle",
        cli_avoid_json=True,
        cli_hide_none_type=True,
        cli_enforce_required=True,
    )

    serve: CliSubCommand[Program] = Field(description="start the service; options as DDPM_… settings")
    generate: CliSubCommand[Generate] = Field(description="make images from noise")
    stream: CliSubCommand[Stream] = Field(description="watch images being made")
    edit: CliSubCommand[Edit] = Field(description="change a picture")
    score: CliSubCommand[Score] = Field(description="how likely pictures are")
    info: CliSubCommand[Info] = Field(description="what a service offers, or what a model is")
    inspect: CliSubCommand[Program] = Field(
        description="what a model folder or file is, and what may go wrong"
    )
    convert: CliSubCommand[Program] = Field(description="another project's checkpoint as a model folder")
    train: CliSubCommand[Program] = Field(description="train a model")
    evaluate: CliSubCommand[Program] = Field(description="measure a trained model")
    completion: CliSubCommand[Completion] = Field(description="shell completion")

    def cli_cmd(self) -> None:
        """Run the command."""
        CliApp.run_subcommand(self)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line. Returns the exit code."""
    given = [*(sys.argv[1:] if arguments is None else arguments)]
    set_on_retry_hooks([tell])
    try:
        if given and given[0] in PROGRAMS:
            return run_program(PROGRAMS[given[0]], given[1:], given[0])
        CliApp.run(Ddpm, given, cli_settings_source=parser_of(Ddpm, __version__))
    except ValidationError as error:
        for found in error.errors(include_input=False):
            complain(f"{option(found['loc'])}: {found['msg']}")
        return 2
    except (UsageError, SettingsError) as error:
        complain(error)
        return 2
    except (ClientError, OSError) as error:
        complain(error)
        return 1
    except KeyboardInterrupt:
        return INTERRUPTED
    except SystemExit as ended:  # --help, and what the parser refuses
        if isinstance(ended.code, str):
            complain(ended.code)
        return ended.code if isinstance(ended.code, int) else 2
    finally:
        set_on_retry_hooks(None)
    return 0


def run_program(module: str, arguments: Sequence[str], name: str = "") -> int:
    """Run the `main` of a program. Returns its exit code."""
    try:
        program = importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in ("model", "service"):
            complain(f"ddpm {name}: this installation does not include {error.name}")
        else:
            complain(f"ddpm {name} needs {package}: pip install 'ddpm-service[train]'")
        return 1
    own = {"program": f"ddpm {name}"} if name == "serve" else {}
    code: int = program.main(list(arguments), **own)
    return code


def place(output: Path | None, name: str, image: Image, count: int) -> Path:
    """Where an image is written: the named file, with the seed where there are several, or a folder."""
    label = "" if image.class_label is None else f"-{image.class_label}".replace("/", "_").replace(" ", "-")
    if output is None or output.is_dir() or not output.suffix:
        return (output or Path()) / f"{name}{label}-{image.seed}{image.suffix}"
    return output if count == 1 else output.with_stem(f"{output.stem}-{image.seed}")


def option(location: Sequence[int | str]) -> str:
    """An option by its name, from where pydantic found it: (command, field, …)."""
    return str(location[1]).replace("_", "-") if len(location) > 1 else "ddpm"


def say(text: object) -> None:
    """A line of the answer."""
    sys.stdout.write(f"{text}\n")


def complain(text: object) -> None:
    """A line about an error."""
    sys.stderr.write(f"{text}\n")


def tell(details: RetryDetails) -> None:
    """Say that a request is sent again, and when."""
    complain(f"{details.caused_by}; trying again in {details.wait_for:.1f} s")


if __name__ == "__main__":
    sys.exit(main())
