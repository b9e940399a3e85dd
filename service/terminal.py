"""Pictures in a terminal: two pixels in a character, redrawn while a stream's previews arrive."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from PIL import Image
from rich.color import Color
from rich.console import Console, Group
from rich.live import Live
from rich.style import Style
from rich.text import Text

from service.client import Completed, Event, Preview, Queued, Result

UPPER_HALF = "▀"
SHADES = " ░▒▓█"
"""From dark to bright, where there are no colours."""
GAP = 1
"""Columns between two pictures."""
SMALLEST, LARGEST_ENLARGED = 8, 32
"""Columns that a picture is not shrunk below to fit beside others, and not enlarged beyond."""
STATUS_ROWS = 2


def fitted(size: tuple[int, int], count: int, columns: int, rows: int) -> tuple[tuple[int, int], int]:
    """How large pictures of this size (width, height) are drawn, in pixels, and how many are in a row.

    All of them have to fit into `columns` characters of one pixel's width and `rows` of two pixels' height,
    unless they would be too small to be seen: then the last ones are left out.
    """
    width, height = size
    factor: float = max(1, LARGEST_ENLARGED // max(size))
    while True:
        w, h = max(1, round(width * factor)), max(1, round(height * factor))
        across = min(count, max(1, (columns + GAP) // (w + GAP)))
        down = -(-count // across)
        if w <= columns and down * -(-h // 2) <= rows:
            return (w, h), across
        if max(w, h) <= SMALLEST:
            return (min(w, columns), h), across
        factor = factor * 0.9 if factor <= 1 else max(1.0, factor - 1)


def draw(pictures: Sequence[Image.Image], columns: int, rows: int, colour: bool = True) -> Text:
    """Pictures of one size side by side, as text of at most so many columns and rows.

    colour: two pixels are the halves of a block; else a character is as bright as the two together.
    """
    size, across = fitted(pictures[0].size, len(pictures), columns, rows)
    small = [_opaque(picture).resize(size, _filter(picture, size)) for picture in pictures]
    lines = []
    most = max(1, rows // -(-size[1] // 2)) * across
    for first in range(0, min(len(small), most), across):
        beside = small[first : first + across]
        for top in range(0, size[1], 2):
            parts = [_line(picture, top, colour) for picture in beside]
            lines.append(Text(" " * GAP).join(parts))
    return Text("\n").join(lines)


def _line(picture: Image.Image, top: int, colour: bool) -> Text:
    """Two rows of pixels as one row of characters."""
    line = Text(no_wrap=True, end="")
    for x in range(picture.width):
        upper = _pixel(picture, x, top)
        lower = _pixel(picture, x, top + 1) if top + 1 < picture.height else None
        if not colour:
            seen = [sum(pixel) / 765 for pixel in (upper, lower) if pixel is not None]
            line.append(SHADES[min(len(SHADES) - 1, int(sum(seen) / len(seen) * len(SHADES)))])
            continue
        background = None if lower is None else Color.from_rgb(*lower)
        line.append(UPPER_HALF, Style(color=Color.from_rgb(*upper), bgcolor=background))
    return line


def _pixel(picture: Image.Image, x: int, y: int) -> tuple[int, int, int]:
    found = picture.getpixel((x, y))
    assert isinstance(found, tuple)
    red, green, blue = found
    return int(red), int(green), int(blue)


def _opaque(picture: Image.Image) -> Image.Image:
    """In RGB, transparent pixels as white."""
    if picture.mode in ("LA", "RGBA"):
        white = Image.new("RGBA", picture.size, "white")
        return Image.alpha_composite(white, picture.convert("RGBA")).convert("RGB")
    return picture.convert("RGB")


def _filter(picture: Image.Image, size: tuple[int, int]) -> Image.Resampling:
    return Image.Resampling.NEAREST if size[0] >= picture.width else Image.Resampling.BOX


def status(event: Event) -> str:
    """An event in a line."""
    match event:
        case Queued():
            return f"queued: {event.position} ahead, {event.eta_s:.1f} s to go"
        case Preview():
            return f"step {event.step}/{event.steps}: {event.eta_s:.1f} s to go"
        case Completed():
            return f"completed in {event.result.timings['total_s']:.2f} s"


def show(events: Iterable[Event], console: Console) -> Result:
    """Follow a stream to its end, and return its result.

    In a terminal the pictures are redrawn as they sharpen; elsewhere each event is a line.
    """
    result = None
    if not console.is_terminal:
        for event in events:
            console.print(status(event), highlight=False)
            result = event.result if isinstance(event, Completed) else None
    else:
        with Live(console=console, auto_refresh=False, vertical_overflow="crop") as live:
            for event in events:
                live.update(_view(event, console), refresh=True)
                result = event.result if isinstance(event, Completed) else None
    assert result is not None, "a stream without a Completed event raises an error"
    return result


def _view(event: Event, console: Console) -> Group | Text:
    line = Text(status(event))
    images = event.images if isinstance(event, Preview) else ()
    if isinstance(event, Completed):
        images = event.result.images
    if not images:
        return line
    colour = console.color_system is not None and not console.no_color
    pictures = [image.pil for image in images]
    picture = draw(pictures, console.width, max(1, console.height - STATUS_ROWS), colour)
    return Group(picture, line)


def summary(info: dict[str, Any]) -> str:
    """What a service says of itself, for people."""
    model, defaults, runtime = info["model"], info["defaults"], info["runtime"]
    classes = ", ".join(model["classes"][:20]) + (" …" if len(model["classes"]) > 20 else "")
    steps = ", ".join(f"{name} {count}" for name, count in defaults["steps_by_sampler"].items())
    return "\n".join(
        (
            f"{model['name']}: {model['height']} × {model['width']}, {model['channels']} channels",
            f"classes    {len(model['classes'])}: {classes}" if classes else "classes    none",
            f"sampler    {defaults['sampler']} by default; steps: {steps}",
            f"runs on    {runtime['device']}, {runtime['name']}, {runtime['dtype']}",
            f"limits     {info['limits']['max_images']} images a request",
            f"version    {info['version']}",
        )
    )
