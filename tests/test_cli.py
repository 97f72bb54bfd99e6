"""The one command: help at once, one sentence for a mistake, one JSON object for a program."""

import errno
import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from flexolmo_jax import cli, terminal
from flexolmo_jax.configuration.registry import OPERATIVE_CONFIG
from flexolmo_jax.errors import UserError
from flexolmo_jax.flags import Flag, Pairs, names
from flexolmo_jax.stages import STAGES, Stage

HEAVY = {"jax", "flax", "gin", "tensorflow", "numpy", "rich", "orbax", "torch", "absl"}


def report(*, out: Path, fail: str = "", times: int = 2, gin: str = "") -> dict:
    """A stage for these tests."""
    print("chatter")
    if fail == "user":
        raise UserError("the file x is empty: give another")
    if fail == "defect":
        raise ZeroDivisionError("division\nby zero")
    if fail == "interrupt":
        raise KeyboardInterrupt("stopped after step 3 and saved")
    if fail == "disk":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "big.bin")
    return {"out": out, "experts": ("public", "math"), "times": times, "nested": {"a": 1}, "gin": gin}


def pairs(*, corpora: dict) -> dict:
    """Another one."""
    return corpora


@pytest.fixture(autouse=True)
def stages(monkeypatch):
    """Two stages more: one that gin configures, one that it does not."""
    flags = (Flag("--out", "", "out", {"type": Path}), Flag("--fail", "", "fail"))
    function = f"{__name__}:report"
    monkeypatch.setitem(STAGES, "report", Stage(summary="for tests", function=function, flags=flags, gin=True))
    monkeypatch.setitem(STAGES, "plain", Stage(summary="for tests", function=function, flags=flags, shows="times"))


@pytest.fixture
def run(capfd):
    """Runs a command line; returns the exit code, standard output and standard error."""

    def run(*arguments: str) -> tuple[int, str, str]:
        code = cli.main(arguments)
        return code, *capfd.readouterr()

    return run


def test_help_answers_in_under_a_second_and_names_every_stage():
    before = os.times()
    done = subprocess.run([sys.executable, "-m", "flexolmo_jax.cli", "--help"], capture_output=True, check=True)
    after = os.times()
    shown = done.stdout.decode()
    # Processor time, because the tests share their machine: on an idle one it is what a person waits.
    assert after.children_user + after.children_system - before.children_user - before.children_system < 1
    assert all(name in shown for name in STAGES if name not in ("report", "plain"))


def test_importing_the_command_imports_nothing_heavy():
    code = f"import sys, flexolmo_jax.cli; print(sorted({HEAVY!r} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("name", STAGES)
def test_flags_of_a_stage_fill_parameters_of_its_function(name):
    stage = STAGES[name]
    parameters = dict(inspect.signature(stage.load()).parameters)
    assert {flag.fills for flag in stage.flags} <= parameters.keys()
    needed = {key for key, parameter in parameters.items() if parameter.default is parameter.empty}
    filled = {flag.fills for flag in stage.flags if not flag.name.startswith("-") or flag.settings.get("required")}
    assert stage.gin or needed == filled


@pytest.mark.parametrize("name", STAGES)
def test_every_stage_has_help(name, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main([name, "--help"])
    assert caught.value.code == 0
    assert f"usage: flexolmo {name}" in capsys.readouterr().out


def test_report_is_shown_to_a_person(run):
    code, out, _ = run("report", "--out", "runs/x")
    assert code == 0
    assert out.splitlines() == ["chatter", "out      runs/x", "experts  public, math", "times    2"]
    assert run("plain", "--out", "runs/x")[1].splitlines() == ["chatter", "2"]


@pytest.mark.parametrize("arguments", [("--json", "report"), ("report", "--json")])
def test_json_is_alone_on_standard_output(run, arguments):
    code, out, err = run(*arguments, "--out", "runs/x", "--gin.report.times=5")
    found = json.loads(out)
    assert code == 0 and err == "chatter\n"
    assert found.pop(OPERATIVE_CONFIG).splitlines()[-1] == "report.times = 5"
    assert found == {"out": "runs/x", "experts": ["public", "math"], "times": 5, "nested": {"a": 1}}


def test_gin_files_and_flags_fill_what_options_leave_open(run, tmp_path):
    (tmp_path / "job.gin").write_text("TIMES = 3\nreport.times = %TIMES\nreport.out = 'elsewhere'\n")
    found = json.loads(run("report", f"--gin_file={tmp_path / 'job.gin'}", "--out", "here", "--json")[1])
    assert (found["times"], found["out"]) == (3, "here")
    found = json.loads(run("report", "--gin_file", str(tmp_path / "job.gin"), "--gin.TIMES=4", "--json")[1])
    assert (found["times"], found["out"]) == (4, "elsewhere")


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        ((), 2, "name a stage: flexolmo --help lists them"),
        (("pretain",), 2, "there is no stage 'pretain'; did you mean 'pretrain'?"),
        (("report", "--uot", "x"), 2, "report does not take '--uot'; did you mean '--out'?"),
        (("report",), 2, "report.out has no value: give --out, or bind it in a gin file"),
        (("report", "--out", "x", "--gin.report.time=1"), 2, "did you mean 'times'?"),
        (("plain", "--out", "x", "--gin.report.times=1"), 2, "plain does not take --gin.report.times=1"),
        (("generate",), 2, "generate: the following arguments are required: CHECKPOINT, --prompt"),
        (("generate", "x", "--prompt", "y", "--top_k", "two"), 2, "argument --top_k: invalid int value: 'two'"),
        (("generate", "/nowhere", "--prompt", "y"), 2, "/nowhere is not an anchor or merged: it has no manifest.json"),
        (("inspect", "/nowhere"), 2, "/nowhere is not a model of ours: it has no manifest.json"),
        (("report", "--out", "x", "--fail", "user"), 2, "the file x is empty: give another"),
        (("report", "--out", "x", "--fail", "disk"), 2, "cannot use big.bin: No space left on device"),
        (("report", "--out", "x", "--fail", "interrupt"), 130, "stopped after step 3 and saved"),
        (("report", "--out", "x", "--fail", "defect"), 1, "(ZeroDivisionError: division by zero); --debug shows where"),
    ],
)
def test_mistake_is_one_line_and_an_exit_code(run, arguments, code, sentence):
    found, _, err = run(*arguments)
    assert found == code
    assert err.startswith("flexolmo: ") and sentence in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("fail", ["user", "defect"])
def test_debug_shows_where(fail):
    with pytest.raises((UserError, ZeroDivisionError)):
        cli.main(["report", "--out", "x", "--fail", fail, "--debug"])


def test_names_are_split_at_commas():
    assert names("public, math,") == ("public", "math")


def test_pairs_become_one_dict(run, monkeypatch):
    flags = (Flag("--corpus", "", "corpora", {"action": Pairs}),)
    monkeypatch.setitem(STAGES, "pairs", Stage(summary="for tests", function=f"{__name__}:pairs", flags=flags))
    assert json.loads(run("pairs", "--corpus", "a=x", "--corpus", "b=y=z", "--json")[1]) == {"a": "x", "b": "y=z"}
    assert run("pairs", "--corpus", "a")[::2] == (2, "flexolmo: pairs: argument --corpus: 'a' is not NAME=VALUE\n")


def test_progress_is_plain_lines_where_there_is_no_terminal(capsys):
    with terminal.Progress("pretrain", total=100, first=10, seconds_between_lines=1e9) as progress:
        for step in [*range(20, 101, 10), 100]:  # the last one twice, as where a step is a megabyte
            progress.update(step, loss=1.5, tokens_per_second=12_345.6, grad_norm=1.0)
    out, err = capsys.readouterr()
    first, last = err.splitlines()
    assert out == ""
    assert first == "pretrain  20/100  loss 1.5000  12,346 tokens/s  0:00:00 left"
    assert last == "pretrain  100/100  loss 1.5000  12,346 tokens/s"


def test_banner_and_table_go_to_standard_error_as_they_are(capsys):
    terminal.banner("merge", {"out": "runs/[x]", "experts": 3})
    terminal.table("bits per byte", ["model", "math"], [["public[a]", 1.23456]])
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines()[:3] == ["merge", "  out      runs/[x]", "  experts  3"]
    assert "public[a]" in err and "1.235" in err
