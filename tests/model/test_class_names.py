"""A name means one class, or all that it could mean are known."""

from __future__ import annotations

from unicodedata import normalize

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.class_names import distinct, meant_by

COMPOSED, DECOMPOSED = normalize("NFC", "café"), normalize("NFD", "café")


@pytest.mark.parametrize(
    ("names", "shown"),
    [
        (("cat", "dog"), ("cat", "dog")),
        ((), ()),
        (("crane", "owl", "crane"), ("crane (0)", "owl", "crane (2)")),
        ((COMPOSED, DECOMPOSED), (f"{COMPOSED} (0)", f"{DECOMPOSED} (1)")),
        (("Turkey", "turkey"), ("Turkey", "turkey")),
        (("0", "1", "2"), ("0", "1", "2")),
        (("2", "1", "0"), ("2 (0)", "1", "0 (2)")),
        (("7", "8"), ("7", "8")),
        (("01", "1"), ("01", "1")),
        (("crane (2)", "crane", "crane"), ("crane (2) (0)", "crane (1)", "crane (2) (2)")),
    ],
)
def test_names_that_would_not_say_have_their_index(names: tuple[str, ...], shown: tuple[str, ...]) -> None:
    assert distinct(names) == shown


NAMES = distinct(("crane", "7", "Turkey", "turkey", "crane", COMPOSED, DECOMPOSED, "dog", "STRASSE"))


@pytest.mark.parametrize(
    ("wanted", "indices"),
    [
        ("dog", [7]),
        ("  DOG ", [7]),
        ("crane", [0, 4]),
        ("Crane (4)", [4]),
        ("7", [1, 7]),
        ("7 (1)", [1]),
        ("turkey", [3]),
        ("Turkey", [2]),
        ("TURKEY", [2, 3]),
        (COMPOSED, [5, 6]),
        (DECOMPOSED.upper(), [5, 6]),
        (f"{COMPOSED} (6)", [6]),
        ("straße", [8]),
        ("0", [0]),
        ("9", []),
        ("-1", []),
        ("01", []),
        ("²", []),
        ("9" * 5000, []),
        ("\ud800", []),
        ("", []),
    ],
)
def test_all_that_a_name_could_mean_is_found(wanted: str, indices: list[int]) -> None:
    assert meant_by(wanted, NAMES) == indices


WORDS = st.one_of(st.integers(0, 12).map(str), st.sampled_from(["a", "A", "é", "e\u0301", "a (1)", " a"]))


@given(st.lists(WORDS, max_size=10).map(tuple))
def test_every_class_has_a_name_that_means_only_it(names: tuple[str, ...]) -> None:
    shown = distinct(names)
    assert [meant_by(name, shown) for name in shown] == [[i] for i in range(len(names))]
