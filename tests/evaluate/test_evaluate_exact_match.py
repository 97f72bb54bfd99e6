"""Exact match with a stub whose answers are known, and with real models for the choice of experts."""

import jax.numpy as jnp
import numpy as np
import pytest
from small_models import write_corpus

from flexolmo_jax.data.builtin import remainder
from flexolmo_jax.data.documents import split_texts
from flexolmo_jax.data.splits import split_of
from flexolmo_jax.data.vocabularies import open_vocabulary
from flexolmo_jax.data.vocabulary import EOS_ID, decode, encode
from flexolmo_jax.errors import UserError
from flexolmo_jax.evaluate.exact_match import BATCH_SIZE, MATH, UNICODE, Question, answers, questions, score

SUMS = remainder(471, 5) + remainder(50, 5) + remainder(3, 2)
CHARACTERS = "U+4E2D Lo CJK UNIFIED IDEOGRAPH-4E2D\nU+0041 Lu LATIN CAPITAL LETTER A\n"


class Parrot:
    """Stands for a language model: writes a known text after each prompt, and nothing it was not told."""

    names = ("public",)
    vocabulary = open_vocabulary("bytes")

    def __init__(self, *continuations: str):
        self._continuations = dict(enumerate(continuations))
        self.shapes = set()
        self._asked = 0

    def generate(self, ids, lengths, *, max_new_tokens, experts, top_k):
        self.shapes.add((ids.shape, max_new_tokens))
        out = np.full((len(ids), max_new_tokens), EOS_ID)
        for row in range(len(ids)):
            text = self._continuations.get(self._asked + row, "")
            new = encode(text)[:max_new_tokens]
            out[row, : len(new)] = new
        self._asked += len(ids)
        return out


def test_questions_are_the_lines_of_a_text():
    assert questions([SUMS], MATH)[0] == Question("remainder by 5 of 471:", " 1")
    assert questions([CHARACTERS], UNICODE)[0] == Question("U+4E2D", " Lo CJK UNIFIED IDEOGRAPH-4E2D")
    assert len(questions([SUMS, SUMS], MATH)) == 3
    assert questions([CHARACTERS, "see U+0041 Lu there\n", "prose"], MATH) == []
    many = [remainder(a, 5) for a in range(100)]
    assert questions(many, MATH, 4) == [questions([many[index]], MATH)[0] for index in (0, 25, 50, 75)]


@pytest.mark.parametrize(
    ("continuation", "right"),
    [
        (" 1\n", 1.0),
        (" 1\nremainder by 5 of 7: 3\n", 1.0),  # only the line itself counts
        (" 2\n", 0.0),
        (" 11\n", 0.0),
        ("1\n", 0.0),
        (" 1", 0.0),  # ends the text, not the line
        (" 1" * 200, 0.0),  # never ends
        ("", 0.0),
    ],
)
def test_a_sum_is_judged_by_its_result(continuation, right):
    assert score(Parrot(continuation), questions([SUMS], MATH)[:1], MATH) == {"math": right}


@pytest.mark.parametrize(
    ("continuation", "category", "line"),
    [
        (" Lo CJK UNIFIED IDEOGRAPH-4E2D\n", 1.0, 1.0),
        (" Lo CJK UNIFIED IDEOGRAPH-4E2E\n", 1.0, 0.0),
        (" Lo CJK UNIFIED IDEOGRAPH-4E2D", 1.0, 0.0),
        (" Ll CJK UNIFIED IDEOGRAPH-4E2D\n", 0.0, 0.0),
        ("0 Lo\n", 0.0, 0.0),
    ],
)
def test_a_character_is_judged_by_category_and_by_line(continuation, category, line):
    asked = questions([CHARACTERS], UNICODE)[:1]
    assert score(Parrot(continuation), asked, UNICODE) == {"unicode": category, "unicode_name": line}


def test_batches_have_one_shape_and_every_question_counts_once():
    asked = questions([remainder(a, 5) for a in range(7)], MATH)
    parrot = Parrot(*(question.answer + "\n" for question in asked[:5]))
    assert score(parrot, asked, MATH, batch_size=3) == {"math": 5 / 7}
    assert len(parrot.shapes) == 1


def test_a_real_model_is_asked_with_the_experts_that_are_permitted(model):
    asked = questions([SUMS], MATH)
    found = answers(model, asked, experts=["public", "math"])
    ids = np.zeros((BATCH_SIZE, 32), np.int32)
    ids[2, : len(asked[1].prompt)] = encode(asked[1].prompt)
    lengths = jnp.full(BATCH_SIZE, len(asked[1].prompt))
    direct = model.generate(jnp.asarray(ids), lengths, max_new_tokens=16, experts=["public", "math"])
    assert found[1] == decode(direct[2].tolist())
    assert len(found) == 3
    assert answers(model, asked, experts=["public"]) != found


def test_no_questions_are_refused(model):
    with pytest.raises(UserError, match="no question"):
        score(model, [], MATH)


def test_split_texts(tmp_path):
    named = write_corpus(tmp_path / "named", "everywhere")
    (named / "test.jsonl").write_text('{"text": "held out"}\n')
    assert list(split_texts(named, "test")) == ["held out"]
    texts = [f"text number {number}" for number in range(200)]
    for number, text in enumerate(texts):
        (tmp_path / "plain").mkdir(exist_ok=True)
        (tmp_path / "plain" / f"{number:03}.txt").write_text(text)
    held_out = list(split_texts(tmp_path / "plain", "test"))
    assert held_out == [text for text in texts if split_of(text) == "test"]
    assert 0 < len(held_out) < 40
