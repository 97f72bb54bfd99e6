"""Loading and decoding: the cache changes nothing, rows are independent, and bad choices are named."""

import numpy as np
import pytest

from flexolmo_jax.data.vocabulary import EOS_ID
from flexolmo_jax.errors import UserError
from flexolmo_jax.infer import LanguageModel, load
from tests.small import CONFIG, random_params, write_anchor, write_contribution

NAMES = ("public", "math", "code")
MODEL = LanguageModel(CONFIG, NAMES, random_params("math", "code"), 2)


def greedy(ids: list[int], count: int, **choice) -> list[int]:
    """Continues one prompt by asking for all logits again after every token."""
    new: list[int] = []
    for _ in range(count):
        window = np.array([[*ids, *new, *[0] * (count - len(new))]], np.int32)
        token = int(np.argmax(np.asarray(MODEL(window, **choice))[0, len(ids) + len(new) - 1]))
        new.append(EOS_ID if EOS_ID in new else token)
    return new


def test_decoding_with_a_cache_gives_what_full_passes_give():
    prompts = [[5, 9, 200], [7, 8, 9, 10, 11], [3]]
    ids = np.zeros((3, 5), np.int32)
    for row, prompt in zip(ids, prompts, strict=True):
        row[: len(prompt)] = prompt
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    new = MODEL.generate(ids, lengths, max_new_tokens=6)
    assert new.shape == (3, 6)
    for row, prompt in zip(new, prompts, strict=True):
        assert row.tolist() == greedy(prompt, 6)


def test_each_row_has_its_own_experts():
    ids, lengths = np.array([[5, 9, 200]] * 3, np.int32), np.array([3, 3, 3], np.int32)
    choices = [["public"], ["public", "math"], ["code"]]
    new = MODEL.generate(ids, lengths, max_new_tokens=5, experts=choices)
    for row, choice in zip(new, choices, strict=True):
        assert row.tolist() == greedy([5, 9, 200], 5, experts=choice)


@pytest.mark.parametrize(
    "call, says",
    [
        ({"experts": ["public", "maths"]}, "no expert 'maths'; it has public, math, code"),
        ({"experts": []}, "at least one expert"),
        ({"experts": [[], ["public"]]}, "at least one expert"),
        ({"experts": [["public"]]}, "chosen for 1 rows, but there are 2"),
        ({"top_k": 4}, "top_k is 4, but the model has 3 experts"),
        ({"top_k": 0}, "top_k is 0"),
    ],
)
def test_a_bad_choice_is_named(call, says):
    with pytest.raises(UserError, match=says):
        MODEL(np.ones((2, 3), np.int32), **call)


def test_loading_what_is_no_model(tmp_path):
    write_anchor(tmp_path / "anchor")
    write_contribution(tmp_path / "math", tmp_path / "anchor", "math")
    assert load(tmp_path / "anchor").names == ("public",)
    with pytest.raises(UserError, match="is a contribution, but an anchor or merged is needed"):
        load(tmp_path / "math")
    with pytest.raises(UserError, match=r"has no manifest.json"):
        load(tmp_path)
