"""Prompts: which class a sentence names."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from msgspec import structs

from model.class_names import distinct
from service.errors import InvalidRequestError
from service.tasks.prompts import MAX_LISTED, Understood, understand
from service.tasks.sampling import ModelCapabilities
from tests.service.fakes import tiny_model
from tests.service.tasks.test_sampling import capabilities

CLOTHES = ("t-shirt", "trouser", "dress", "shirt", "bag", "ankle boot")
LETTERS = ("A", "B", "C", "I")
LISTS = ("tench, Tinca tinca", "crane", "crane", "maillot", "maillot, tank suit", "policeman", "wolf", "7")


def knowing(names: Sequence[str]) -> ModelCapabilities:
    return structs.replace(capabilities(), class_names=distinct(tuple(names)))


def refusal(prompt: str, names: Sequence[str]) -> str:
    with pytest.raises(InvalidRequestError) as refused:
        understand(prompt, knowing(names))
    assert refused.value.field == "prompt"
    return refused.value.detail


@pytest.mark.parametrize(
    ("prompt", "label"),
    [
        ("ankle boot", 5),
        ("an ankle boot", 5),
        ("Ankle boots, please", 5),
        ("ANKLE_BOOT", 5),
        ("two ankle-boots on a table!", 5),
        ("a T-shirt", 0),
        ("tshirts", 0),
        ("T shirt", 0),
        ("the shirts", 3),
        ("Could you draw me a bag? Thank you", 4),
        ("dresses", 2),
        ("a pair of trousers", 1),
        ("\tdress\n", 2),
        ("5", 5),
    ],
)
def test_a_sentence_names_a_class(prompt: str, label: int) -> None:
    assert understand(prompt, knowing(CLOTHES)) == Understood(label, CLOTHES[label])


@pytest.mark.parametrize(
    ("prompt", "label"),
    [("a B", 1), ("the letter A", 0), ("A, please", 0), ("I would like a C", 2), ("as B", 1), ("an I", 3)],
)
def test_an_article_before_a_word_is_no_letter(prompt: str, label: int) -> None:
    assert understand(prompt, knowing(LETTERS)).label == label
    assert "no class" in refusal("a zebra", LETTERS)


@pytest.mark.parametrize(
    ("prompt", "label"),
    [
        ("some tench", 0),
        ("Tinca tinca", 0),
        ("a maillot", 3),
        ("tank suits", 4),
        ("crane (1)", 1),
        ("a crane (2)", 2),
        ("policemen", 5),
        ("three wolves", 6),
        ("the digit 7", 7),
    ],
)
def test_each_part_of_a_list_is_a_name(prompt: str, label: int) -> None:
    assert understand(prompt, knowing(LISTS)).label == label


def test_a_whole_name_goes_before_the_plural_of_another() -> None:
    for label, prompt in enumerate(("some glass", "some glasses")):
        assert understand(prompt, knowing(("glass", "glasses"))).label == label


def test_a_short_word_is_no_plural() -> None:
    assert "no class" in refusal("the letter a", ("As", "B"))


@pytest.mark.parametrize("prompt", ["a zebra", "boots", "ankle", "shirtless", "as", "?", "99"])
def test_a_prompt_without_a_class_lists_the_classes(prompt: str) -> None:
    assert refusal(prompt, CLOTHES).endswith(
        "The classes are t-shirt, trouser, dress, shirt, bag, ankle boot."
    )


def test_a_long_list_of_classes_is_cut() -> None:
    detail = refusal("a zebra", [f"kind {i}x" for i in range(MAX_LISTED + 1)])
    assert detail.endswith(f"kind {MAX_LISTED - 1}x, ….")


@pytest.mark.parametrize(
    ("prompt", "names", "meant"),
    [
        ("a bag and a dress", CLOTHES, "2 (dress) or 4 (bag)"),
        ("a crane", LISTS, "1 (crane (1)) or 2 (crane (2))"),
        ("crane", LISTS, "1 (crane (1)) or 2 (crane (2))"),
    ],
)
def test_a_prompt_that_names_several_classes_is_refused(
    prompt: str, names: Sequence[str], meant: str
) -> None:
    assert meant in refusal(prompt, names)


def test_a_class_named_twice_is_one() -> None:
    assert understand("a bag, a red bag, many bags", knowing(CLOTHES)).label == 4


def test_a_blank_prompt_is_unconditional() -> None:
    assert understand(" ", knowing(CLOTHES)) == Understood(None, "No class: unconditional.")
    with pytest.raises(InvalidRequestError, match="a class is needed"):
        understand("", capabilities(tiny_model(guided=False)))


def test_an_unconditional_model_takes_any_prompt() -> None:
    understood = understand("a zebra", capabilities(tiny_model(classes=0)))
    assert understood == Understood(None, "The model is unconditional: the prompt was not used.")


def test_a_model_of_numbers_takes_the_number() -> None:
    numbers = structs.replace(capabilities(), class_names=())
    assert understand("a picture of 250, please", numbers) == Understood(250, "250")
    for prompt in ("some", "2 of 250"):
        with pytest.raises(InvalidRequestError, match="takes a number"):
            understand(prompt, numbers)
