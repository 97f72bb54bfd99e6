"""The merge's flags: what goes together and what does not."""

import pytest

from flexolmo_jax import cli
from flexolmo_jax.flags import number_of_bytes

REFUSED = {
    "no model": (["--out", "x"], "either --anchor, with contributions, or --model"),
    "two models": (["--out", "x", "--anchor", "a", "--model", "m"], "either --anchor, with contributions, or --model"),
    "adding to an anchor": (["--out", "x", "--anchor", "a", "--add", "c"], "to an --anchor go --contribution"),
    "contributing to a model": (["--out", "x", "--model", "m", "--contribution", "c"], "--add it to a merged --model"),
    "a budget in words": (["--out", "x", "--memory-budget", "much"], "'much' is not a number of bytes"),
}


@pytest.mark.parametrize("flags", REFUSED)
def test_flags_that_do_not_go_together(flags, capsys):
    arguments, complaint = REFUSED[flags]
    assert cli.main(["merge", *arguments]) == 2
    assert complaint in capsys.readouterr().err


@pytest.mark.parametrize(("text", "size"), [("512MiB", 2**29), ("1.5GiB", 3 * 2**29), ("4KiB", 4096), ("1000", 1000)])
def test_bytes_are_written_with_units(text, size):
    assert number_of_bytes(text) == size


@pytest.mark.parametrize("words", [["contribution"], ["contribution", "veryfy"], ["contribution", "--json"]])
def test_half_a_stage_of_two_words_is_no_stage(words, capsys):
    assert cli.main(words) == 2
    assert "there is no stage 'contribution" in capsys.readouterr().err
