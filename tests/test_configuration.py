"""gin held to account: what is accepted, and one sentence for everything that is not."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import pytest

from flexolmo_jax.configuration import check_file, configure
from flexolmo_jax.configuration.annotations import Mismatch, conform, describe
from flexolmo_jax.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    width: int
    heads: int = 4

    def __post_init__(self):
        if self.width % self.heads:
            raise UserError(f"Shape.width is {self.width}, which {self.heads} heads do not divide evenly")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Noise:
    epsilon: float = 8.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    steps: int
    rate: float = 0.1
    kind: Literal["raw", "mean"] = "raw"
    betas: tuple[float, float] = (0.9, 0.95)
    noise: Noise | None = None


def bake(
    *,
    out: Path,
    text: Path,
    shape: Shape,
    recipe: Recipe,
    owners: tuple[str, ...] = (),
    shares: Mapping[str, float] | None = None,
    gin: str = "",
) -> dict:
    return {"out": out, "gin": gin, "shape": shape, "recipe": recipe}


GOOD = """
include 'shape.gin'
STEPS = 500
TEXT = %gin.REQUIRED
Recipe.steps = %STEPS
bake.text = %TEXT
"""


@pytest.fixture
def files(tmp_path):
    """Writes gin files and returns the path of the last one."""

    def write(**contents: str) -> Path:
        for name, content in contents.items():
            (tmp_path / f"{name}.gin").write_text(content)
        return tmp_path / f"{name}.gin"

    write(shape="Shape:\n  width = 64\n  heads = 8  # a comment\n")
    return write


def test_files_flags_and_given_arguments_become_one_call(files):
    flags = ["TEXT='corpus'", "Recipe.rate=1", "bake.owners=['a', 'b']", "bake.shares={'a': 1}"]
    configured = configure(bake, [files(job=GOOD)], flags, given={"out": Path("run")})
    assert configured.arguments == {
        "out": Path("run"),
        "text": Path("corpus"),
        "shape": Shape(width=64, heads=8),
        "recipe": Recipe(steps=500, rate=1.0),
        "owners": ("a", "b"),
        "shares": {"a": 1.0},
    }
    assert isinstance(configured.arguments["recipe"].rate, float)


def test_stage_receives_its_operative_configuration(files):
    configured = configure(bake, [files(job=GOOD)], ["TEXT='corpus'"], given={"out": Path("run")})
    result = configured()
    assert result["gin"] == configured.operative_config
    for line in ("Recipe.steps = 500", "Recipe.rate = 0.1", "Shape.heads = 8", "bake.shape = @Shape()"):
        assert line in result["gin"].splitlines()


def test_operative_configuration_names_no_path_and_gives_the_same_call_again(files):
    first = configure(bake, [files(job=GOOD)], ["TEXT='secret/corpus'"], given={"out": Path("run")})
    assert "secret" not in first.operative_config
    again = configure(bake, [files(again=first.operative_config)], ["bake.text='secret/corpus'"], given={"out": "run"})
    assert again.arguments["recipe"] == first.arguments["recipe"]
    assert again.operative_config == first.operative_config


def test_nothing_remains_of_an_earlier_call(files):
    file = files(job=GOOD)
    configure(bake, [file], ["TEXT='a'", "Recipe.rate=0.5"], given={"out": Path("run")})
    assert configure(bake, [file], ["TEXT='a'"], given={"out": Path("run")}).arguments["recipe"].rate == 0.1


def test_later_files_and_flags_win(files):
    base = files(base=GOOD)
    owner = files(owner=f"include '{base.name}'\nTEXT = 'mine'\nSTEPS = 7\n")
    assert configure(bake, [owner], [], given={"out": Path("run")}).arguments["recipe"].steps == 7
    assert configure(bake, [owner], ["STEPS=8"], given={"out": Path("run")}).arguments["recipe"].steps == 8
    flags = ["Recipe.steps=9"]
    assert configure(bake, [owner], flags, given={"out": Path("run")}).arguments["recipe"].steps == 9


def test_choice_is_made_by_reference(files):
    flags = ["TEXT='a'", "Recipe.noise=@Noise()", "Noise.epsilon=2"]
    configured = configure(bake, [files(job=GOOD)], flags, given={"out": Path("run")})
    assert configured.arguments["recipe"].noise == Noise(epsilon=2.0)


def test_include_is_found_in_the_working_directory(files, tmp_path, monkeypatch):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep/job.gin").write_text(GOOD)
    monkeypatch.chdir(tmp_path)
    configured = configure(bake, ["deep/job.gin"], ["TEXT='a'"], given={"out": Path("run")})
    assert configured.arguments["shape"].width == 64


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ([], "job.gin:4: the macro TEXT has no value: write TEXT = … in your gin file, or give --gin.TEXT=VALUE"),
        (["TEXT=a/b"], "--gin.TEXT=a/b has no gin value after '=': text needs quotes, as in --gin.TEXT='\"a/b\"'"),
        (["TEXT"], "--gin.TEXT sets nothing: write --gin.NAME=VALUE"),
        (["TEXT='a'\nSTEPS=3"], "is more than one statement"),
        (["TEXT='a'", "STEPSS=4"], "--gin.STEPSS=4: nothing uses the macro STEPSS; did you mean 'STEPS'?"),
        (["TEXT='a'", "STEPS='five'"], "--gin.STEPS='five': Recipe.steps must be an integer, but is 'five'"),
        (["TEXT='a'", "STEPS=True"], "Recipe.steps must be an integer, but is True"),
        (["TEXT='a'", "STEPS=1.0"], "Recipe.steps must be an integer, but is 1.0"),
        (["TEXT='a'", "STEPS=%STEPS"], "the macro STEPS refers to itself"),
        (["TEXT='a'", "STEPS=%STEP"], "the macro STEP has no value"),
        (["TEXT='a'", "Recipe.rate=None"], "Recipe.rate must be a number, but is None"),
        (["TEXT='a'", "Recipe.kind='men'"], "Recipe.kind must be 'raw' or 'mean', but is 'men'"),
        (["TEXT='a'", "Recipe.betas=(1, 2, 3)"], "must be a tuple of (a number, a number), but is (1, 2, 3)"),
        (["TEXT='a'", "Recipe.stesp=1"], "Recipe has no parameter 'stesp'; did you mean 'steps'?"),
        (["TEXT='a'", "Recip.steps=1"], "'Recip' cannot be configured here; did you mean 'Recipe'?"),
        (["TEXT='a'", "bake.shape=@Shap()"], "@Shap cannot be configured here; did you mean 'Shape'?"),
        (["TEXT='a'", "bake.shape=@Shape"], "@Shape must be a dataclass that is called: @Name()"),
        (["TEXT='a'", "bake.shape=@Recipe()"], "bake.shape must be @Shape(), but is @Recipe()"),
        (["TEXT='a'", "bake.gin='x'"], "bake has no parameter 'gin'"),
        (["TEXT='a'", "Noise.epsilon=1"], "Noise.epsilon has no effect, because nothing uses @Noise()"),
        (["TEXT='a'", "owner/Recipe.steps=1"], "owner/… is a gin scope, and these are not supported"),
        (["TEXT='a'", "Shape.width=30"], "Shape.width is 30, which 8 heads do not divide evenly"),
    ],
)
def test_mistake_is_one_sentence(files, flags, sentence):
    with pytest.raises(UserError) as caught:
        configure(bake, [files(job=GOOD)], flags, given={"out": Path("run")})
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value).replace(flags[0] if flags else "", "")


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("Recipe.steps = (3,\n", "job.gin: this is not gin: a bracket or a quote is never closed"),
        ("\nRecipe.steps = five\n", "job.gin:2: 'five' is not a value: quote text"),
        ("a b\n", "job.gin:1: this is not gin"),
        ("\ninclude 'nowhere.gin'\n", "job.gin:2: there is no gin file 'nowhere.gin'"),
        ("import os\n", "job.gin:1: import is not allowed in a gin file"),
        ("from __gin__ import dynamic_registration\n", "import is not allowed in a gin file"),
        ("include 'job.gin'\n", "job.gin includes itself"),
    ],
)
def test_file_that_is_wrong_is_one_sentence(files, content, sentence):
    with pytest.raises(UserError, match=r"^[^\n]+$") as caught:
        configure(bake, [files(job=content)])
    assert sentence in str(caught.value)


def test_missing_file_is_one_sentence():
    with pytest.raises(UserError, match=r"--gin_file=no\.gin: there is no gin file 'no\.gin'"):
        configure(bake, ["no.gin"])


def test_missing_value_names_the_flag_that_gives_it(files):
    with pytest.raises(UserError, match=r"^bake\.out has no value: give --out, or bind it in a gin file$"):
        configure(bake, [files(job=GOOD)], ["TEXT='a'"], options={"out": "--out"})
    with pytest.raises(UserError, match=r"^Recipe\.steps has no value: give --gin\.Recipe\.steps=VALUE"):
        configure(bake, [], ["bake.text='a'", "Shape.width=8"], given={"out": Path("run")})


def test_file_for_others_to_include_may_leave_values_open_but_not_be_wrong(files):
    check_file(files(job=GOOD), [bake])
    check_file(files(part="Shape.width = %WIDTH\n"), [bake])
    with pytest.raises(UserError, match="nothing uses the macro LEFT_OVER"):
        check_file(files(job=GOOD + "LEFT_OVER = 3\n"), [bake])
    with pytest.raises(UserError, match=r"Shape\.heads must be an integer"):
        check_file(files(part="Shape.heads = 'two'\n"), [bake])


@pytest.mark.parametrize(
    ("value", "annotation", "expected"),
    [
        (3, float, 3.0),
        ("a/b", Path, Path("a/b")),
        (None, int | None, None),
        (3, int | str, 3),
        ([1, 2], tuple[int, ...], (1, 2)),
        (["a"], Sequence[Path], (Path("a"),)),
        ({"a": 1}, dict[str, float], {"a": 1.0}),
        (1, Literal[1, "all"], 1),
        (False, bool, False),
        ({"x"}, Any, {"x"}),
    ],
)
def test_value_conforms(value, annotation, expected):
    found = conform(value, annotation)
    assert found == expected and type(found) is type(expected)


@pytest.mark.parametrize(
    ("value", "annotation"),
    [
        (True, int),
        (True, float),
        (True, Literal[1]),
        (1, bool),
        ("3", int),
        (3, str),
        (3, Path),
        (None, int),
        ("ab", tuple[str, ...]),
        ([1, "2"], tuple[int, ...]),
        ((1,), tuple[int, int]),
        ([], dict[str, int]),
        (3, Shape),
    ],
)
def test_value_does_not_conform(value, annotation):
    with pytest.raises(Mismatch):
        conform(value, annotation)
    assert describe(annotation)


def test_configuring_leaves_the_classes_as_they_are():
    flags = ["bake.text='a'", "Shape.width=8", "Shape.heads=2", "Recipe.steps=1"]
    assert configure(bake, [], flags, given={"out": Path("run")}).arguments["shape"].heads == 2
    assert Shape(width=8).heads == 4
