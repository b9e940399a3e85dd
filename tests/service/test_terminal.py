"""Pictures as text."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from rich.console import Console
from rich.text import Text

from service import client
from service.client import Completed, Event, Preview, Queued, Result
from service.terminal import SMALLEST, draw, fitted, show

RED, BLUE, BLACK, WHITE = (255, 0, 0), (0, 0, 255), (0, 0, 0), (255, 255, 255)


def picture(*rows: str) -> Image.Image:
    """One pixel per letter: r, b, w, and . for black."""
    colours = {"r": RED, "b": BLUE, "w": WHITE, ".": BLACK}
    image = Image.new("RGB", (len(rows[0]), len(rows)))
    for y, row in enumerate(rows):
        for x, letter in enumerate(row):
            image.putpixel((x, y), colours[letter])
    return image


def cells(text: Text) -> list[list[tuple[Any, ...]]]:
    """(character, foreground, background) of every cell."""
    console = Console(width=200, color_system="truecolor", force_terminal=True)
    found = []
    for line in console.render_lines(text, pad=False):
        row = []
        for segment in line:
            style = segment.style
            fore = style and style.color and style.color.triplet
            back = style and style.bgcolor and style.bgcolor.triplet
            row += [(character, fore, back) for character in segment.text]
        found.append(row)
    return found


def test_a_character_has_two_pixels() -> None:
    image = picture("r" * 32, *["b" * 32] * 31)
    rows = cells(draw([image], 80, 24))
    assert (len(rows), len(rows[0])) == (16, 32)
    assert rows[0][0] == ("▀", RED, BLUE)
    assert rows[1][0] == ("▀", BLUE, BLUE)


def test_an_odd_row_has_nothing_below() -> None:
    rows = cells(draw([picture(*["r" * 33] * 33)], 80, 24))
    assert rows[-1][0] == ("▀", RED, None)


def test_small_pictures_are_enlarged_without_smoothing() -> None:
    rows = cells(draw([picture("rb", "..")], 80, 24))
    assert (len(rows), len(rows[0])) == (16, 32)
    assert rows[0][15] == ("▀", RED, RED)
    assert rows[0][16] == ("▀", BLUE, BLUE)


def test_pictures_are_side_by_side() -> None:
    rows = cells(draw([picture(*["r" * 32] * 32), picture(*["b" * 32] * 32)], 80, 24))
    assert rows[0][31] == ("▀", RED, RED)
    assert rows[0][32][0] == " "
    assert rows[0][33] == ("▀", BLUE, BLUE)


def test_without_colours_a_character_is_as_bright_as_its_pixels() -> None:
    image = Image.new("L", (32, 32))
    for x, level in enumerate((0, 60, 110, 160, 255)):
        image.paste(level, (x, 0, x + 1, 32))
    first = draw([image], 80, 24, colour=False).plain.splitlines()[0]
    assert first.startswith(" ░▒▓█")


def test_what_is_transparent_is_white() -> None:
    image = Image.new("RGBA", (32, 32), (255, 0, 0, 0))
    assert cells(draw([image], 80, 24))[0][0] == ("▀", WHITE, WHITE)


@given(st.integers(1, 300), st.integers(1, 300), st.integers(1, 70), st.integers(10, 200), st.integers(5, 60))
def test_pictures_fit(width: int, height: int, count: int, columns: int, rows: int) -> None:
    (w, h), across = fitted((width, height), count, columns, rows)
    assert across * (w + 1) - 1 <= columns
    down = -(-count // across)
    assert down * -(-h // 2) <= rows or max(w, h) <= SMALLEST
    text = draw([Image.new("L", (width, height))] * count, columns, rows, colour=False)
    lines = text.plain.split("\n")
    assert len(lines) <= rows
    assert max(map(len, lines)) <= columns


# ── A stream ───────────────────────────────────────────────────────────────────────────────────


def png(level: int) -> client.Image:
    buffer = io.BytesIO()
    Image.new("L", (32, 32), level).save(buffer, "PNG")
    return client.Image(0, 7, None, buffer.getvalue(), "image/png")


def events(level: int = 100) -> Iterator[Event]:
    yield Queued("a1", 2, 0.5, 7)
    yield Preview(1, 20, 99, 0.4, [png(level)])
    yield Completed(Result("a1", "m", [png(255)], {}, {"total_s": 1.25}))


def test_elsewhere_each_event_is_a_line() -> None:
    console = Console(file=io.StringIO(), width=80)
    assert show(events(), console).id == "a1"
    assert isinstance(console.file, io.StringIO)
    assert console.file.getvalue().splitlines() == [
        "queued: 2 ahead, 0.5 s to go",
        "step 1/20: 0.4 s to go",
        "completed in 1.25 s",
    ]


@pytest.mark.parametrize(
    ("system", "level", "code"),
    # Levels differ, since rich remembers how it wrote a colour first.
    [("truecolor", 100, "38;2;100;100;100"), ("256", 128, "38;5;244"), (None, 160, "▓")],
)
def test_in_a_terminal_the_picture_is_drawn_in_the_colours_there_are(
    system: str | None, level: int, code: str
) -> None:
    console = Console(
        file=io.StringIO(),
        width=80,
        height=24,
        force_terminal=True,
        color_system=system,  # type: ignore[arg-type]
        no_color=system is None,
    )
    show(events(level), console)
    assert isinstance(console.file, io.StringIO)
    drawn = console.file.getvalue()
    assert code in drawn
    assert "step 1/20" in drawn
    assert "completed in 1.25 s" in drawn
