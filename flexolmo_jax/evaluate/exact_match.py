"""Exact match by greedy decoding: remainders, and look-ups of characters.

Questions are made from the lines of a corpus's held-out texts: a line's beginning is the prompt, its rest the answer.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from flexolmo_jax.errors import UserError
from flexolmo_jax.evaluate.selection import evenly_spaced
from flexolmo_jax.infer import LanguageModel

QUESTIONS = 200
"""How many questions of a kind are asked unless a call says otherwise."""

BATCH_SIZE = 50

_PROMPT_MULTIPLE, _ANSWER_MULTIPLE = 16, 16
"""Shapes are rounded up to these, so that different selections of questions share one compiled function."""


class Question(NamedTuple):
    """A prompt, and how the line goes on in the text it was taken from, without the line's end."""

    prompt: str
    answer: str


class Kind(NamedTuple):
    """A kind of question.

    Attributes:
      entry: matches one entry of a text, its end of line included; the groups are prompt and answer.
      tasks: by name, the judge of a continuation: (what the model wrote, the answer) -> whether it is right.
    """

    entry: re.Pattern[str]
    tasks: Mapping[str, Callable[[str, str], bool]]


def same_category(text: str, answer: str) -> bool:
    """Whether the line begins with the category of the answer: a space and two letters."""
    return _line(text)[:3] == answer[:3]


def same_line(text: str, answer: str) -> bool:
    """Whether the whole line is the answer; a line that never ends is wrong."""
    return "\n" in text and _line(text) == answer


MATH = Kind(re.compile(r"(remainder by \d of \d+:)( \d)\n"), {"math": same_line})
"""`remainder by 5 of 471:`, answered by ` 1`."""

UNICODE = Kind(
    re.compile(r"(U\+[0-9A-F]{4,6})( [A-Z][a-z] .+)\n"), {"unicode": same_category, "unicode_name": same_line}
)
"""`U+4E2D`, answered by ` Lo CJK UNIFIED IDEOGRAPH-4E2D`: once its category alone, once the whole line."""

KINDS = (MATH, UNICODE)


def questions(texts: Iterable[str], kind: Kind, most: int | None = QUESTIONS) -> list[Question]:
    """At most `most` questions, evenly spaced over the distinct ones of all texts that consist of such entries alone.

    The texts, in the same order, give the same questions. There are none where the texts are of another kind.
    """
    found: dict[Question, None] = {}
    for text in texts:
        entries = list(kind.entry.finditer(text))
        if entries and "".join(entry[0] for entry in entries) == text:
            found |= {Question(entry[1], entry[2]): None for entry in entries}
    distinct = list(found)
    return [distinct[index] for index in evenly_spaced(len(distinct), most)]


def score(
    model: LanguageModel,
    asked: Sequence[Question],
    kind: Kind,
    *,
    experts: Sequence[str] | None = None,
    top_k: int | None = None,
    batch_size: int = BATCH_SIZE,
) -> dict[str, float]:
    """Share of the questions that the model answers rightly, from 0 to 1, for every task of the kind.

    Raises:
      UserError: there is no question, an expert is unknown, or `top_k` does not fit the model.
    """
    texts = answers(model, asked, experts=experts, top_k=top_k, batch_size=batch_size)
    return {
        task: sum(is_right(text, question.answer) for text, question in zip(texts, asked, strict=True)) / len(asked)
        for task, is_right in kind.tasks.items()
    }


def answers(
    model: LanguageModel,
    asked: Sequence[Question],
    *,
    experts: Sequence[str] | None = None,
    top_k: int | None = None,
    batch_size: int = BATCH_SIZE,
) -> list[str]:
    """What the model writes after each prompt, greedily, for somewhat longer than the longest answer.

    Every batch has the same shape, and permitted experts are an argument of the compiled function.

    Raises:
      UserError: there is no question, an expert is unknown, or `top_k` does not fit the model.
    """
    if not asked:
        raise UserError("there is no question to ask: the held-out texts hold no line of this kind")
    encode = model.vocabulary.encode
    prompts = encode([question.prompt for question in asked])
    width = _round_up(max(map(len, prompts)), _PROMPT_MULTIPLE)
    longest = max(map(len, encode([question.answer for question in asked])))
    texts: list[str] = []
    for start in range(0, len(prompts), batch_size):
        batch = prompts[start : start + batch_size]
        filled = batch + [batch[0]] * (batch_size - len(batch))
        ids = np.zeros((batch_size, width), np.int32)
        for row, prompt in zip(ids, filled, strict=True):
            row[: len(prompt)] = prompt
        new = model.generate(
            jnp.asarray(ids),
            jnp.array([len(prompt) for prompt in filled]),
            max_new_tokens=_round_up(longest + 1, _ANSWER_MULTIPLE),
            experts=model.names if experts is None else experts,
            top_k=top_k,
        )
        texts += [model.vocabulary.decode(row) for row in new[: len(batch)].tolist()]
    return texts


def _line(text: str) -> str:
    return text.partition("\n")[0]


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
