"""The documentation says what is so: its commands run, and what it names exists."""

import ast
import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from flexolmo_jax import confine
from flexolmo_jax.configuration.check import configurables, parameters
from flexolmo_jax.stages import STAGES
from flexolmo_jax.store.manifest import ExpertRecord, Manifest
from tests.docs.conftest import JOB, REPOSITORY
from tests.test_architecture import MAY_IMPORT

PAGES = {page.name: page.read_text(encoding="utf-8") for page in sorted((REPOSITORY / "docs").glob("*.md"))}
OTHER = [REPOSITORY / name for name in ("README.md", "CONTRIBUTING.md", "launch/README.md")]
FILES = [*(REPOSITORY / "docs" / name for name in PAGES), *(file for file in OTHER if file.exists())]

BLOCK = re.compile(r"^```(bash|python)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
"""What a page shows in such a block runs as it stands, in the page's order; anything else is shown in other blocks."""

LEAVES = {
    "bring_your_own_text.md": [
        "runs/prepared/mine/manifest.json",
        "runs/prepared/mixed/manifest.json",
        "runs/mine/contribution/manifest.json",
    ],
    "train_my_expert.md": ["runs/mine/contribution/manifest.json", "runs/mine_published/contribution/manifest.json"],
    "confine.md": ["runs/mine_confined/contribution/manifest.json"],
    "embed_domain.md": ["runs/domain_private/embedding.json", "runs/mine_embedded/contribution/manifest.json"],
    "merge.md": [
        "runs/math_and_code/manifest.json",
        "runs/math_and_unicode/manifest.json",
        "runs/code_again/manifest.json",
    ],
    "contributions.md": ["runs/only_math/manifest.json", "runs/full_and_low_rank/manifest.json"],
    "tune_router.md": ["runs/proxies/math/train.jsonl.gz", "runs/tuned/merged/manifest.json"],
    "choose_experts.md": ["runs/evaluation/report.json", "runs/evaluation/opt_out.png"],
    "plan.md": ["runs/plan/plan.json", "runs/plan/plan.png"],
    "export.md": ["runs/hf/all/model.safetensors", "runs/hf/math/config.json"],
    "import.md": ["runs/math/merged/manifest.json", "runs/math_and_code_again/manifest.json"],
}
"""Files that a page's commands must have written."""

SAYS = {
    "bring_your_own_text.md": ["train_documents", "runs/prepared/public  0.25", "contribution"],
    "confine.md": ["exit code 2", "list my_text: allowed", "list math: Permission denied", "write: Permission denied"],
    "merge.md": ["public, math, code", "('public', 'math', 'unicode')", "differing  0"],
    "contributions.md": ["signed_by", "energy_kept"],
    "choose_experts.md": ["'U+4E2D' goes on", "expert:math", "merged:without:code", ", 264)"],
    "embed_domain.md": ["cosine_to_public", "one document added, removed or replaced"],
    "plan.md": ["train-expert on h100:64 fits", "by formulas alone"],
    "tune_router.md": ['"router_tuned_on": ["math", "code"]'],
    "export.md": ["FlexOlmoForCausalLM", "max_difference"],
    "import.md": ["array_bytes", "public, math, code"],
    "formats.md": ["merged", '"tokens_seen": 10'],
    "privacy.md": ["contribution/manifest.json"],
}
"""What a page's commands must have printed."""

NEEDS_TRAINING = {"bring_your_own_text.md", "train_my_expert.md", "embed_domain.md", "confine.md", "tune_router.md"}
NEEDS_TRANSFORMERS = {"export.md"}
SLOW = NEEDS_TRAINING | NEEDS_TRANSFORMERS | {"choose_experts.md"}


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, marks=[pytest.mark.slow] if page in SLOW else [])
        for page in PAGES
        if BLOCK.search(PAGES[page])
    ],
)
def test_commands_of_a_page_run_as_written(page, request):
    if page == "confine.md" and not confine.kernel_version():
        pytest.skip("this kernel has no Landlock")
    if page in NEEDS_TRANSFORMERS:
        pytest.importorskip("transformers")
        pytest.importorskip("torch")
    shell = request.getfixturevalue("shell")
    if page in ("confine.md", "embed_domain.md"):  # They go on with the job file of another page.
        shell.write("my_job.gin", JOB)
    else:
        shell.make_demo_sizes_smaller()
    printed = "".join(getattr(shell, language)(text) for language, text in BLOCK.findall(PAGES[page]))
    assert [name for name in LEAVES.get(page, []) if not (shell.directory / name).is_file()] == []
    assert [text for text in SAYS.get(page, []) if text not in printed] == [], printed


def test_pages_that_are_expected_to_do_something_exist():
    assert LEAVES.keys() | SAYS.keys() | SLOW <= PAGES.keys()


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(REPOSITORY)))
def test_links_lead_somewhere(file):
    text = file.read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)\s]+)\)", text)
    assert [link for link in links if not _leads_somewhere(file, link)] == []


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(REPOSITORY)))
def test_files_of_the_repository_that_are_named_exist(file):
    named = set(
        re.findall(r"\b(?:configs|launch|tests|docs|flexolmo_jax)/[\w./-]*\w", file.read_text(encoding="utf-8"))
    )
    assert [name for name in sorted(named) if not (REPOSITORY / name).exists()] == []


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(REPOSITORY)))
def test_stages_and_flags_that_are_named_exist(file):
    text = file.read_text(encoding="utf-8")
    for stage, flags in _command_lines(text):
        assert stage in STAGES, f"flexolmo {stage}"
        assert set(flags) <= _flags(stage), f"flexolmo {stage}"
    if file.parent.name == "docs":
        everywhere = set().union(*map(_flags, STAGES)) | {"--read", "--write", "--help"}
        assert set(re.findall(r"`(--\w[\w-]*)", text)) - {"--gin"} <= everywhere


def test_settings_that_are_named_exist_and_have_the_defaults_that_the_pages_say():
    known = configurables(*(stage.load() for stage in STAGES.values() if stage.gin))
    text = "\n".join(file.read_text(encoding="utf-8") for file in FILES)
    named = set(re.findall(r"\b([A-Z][A-Za-z]+)\.([a-z]\w*)\b(?!\()", text))
    ours = {(name, field) for name, field in named if name in known or name.endswith("Config")}
    assert {("ExpertConfig", "public_share"), ("RunConfig", "steps")} <= ours
    assert [f"{name}.{field}" for name, field in sorted(ours) if field not in parameters(known[name])] == []

    stated = re.findall(r"^\| `([A-Z]\w+)\.(\w+)` \| ([^|]+) \|", PAGES["train_my_expert.md"], re.MULTILINE)
    assert len(stated) >= 8
    for name, field, value in stated:
        defaults = {each.name: each.default for each in dataclasses.fields(known[name])}
        assert ast.literal_eval(value) == defaults[field], f"{name}.{field}"


def test_architecture_page_draws_the_plan_that_is_tested():
    rows = re.findall(r"^\| `(\w+)` \| [^|]+ \| ([^|]+) \|$", PAGES["architecture.md"], re.MULTILINE)
    assert {room: set(re.findall(r"`(\w+)`", below)) for room, below in rows} == MAY_IMPORT


def test_formats_page_lists_every_field_of_a_manifest():
    first_columns = re.findall(r"^\| (`[^|]+) \|", PAGES["formats.md"], re.MULTILINE)
    listed = {name for column in first_columns for name in re.findall(r"`(\w+)`", column)}
    fields = {field.name for kind in (Manifest, ExpertRecord) for field in dataclasses.fields(kind)}
    assert fields <= listed
    assert {name for name in listed if name.islower()} - fields == set()


def _leads_somewhere(file: Path, link: str) -> bool:
    if link.startswith(("http://", "https://", "mailto:")):
        return True
    path, _, heading = link.partition("#")
    target = file.parent / path if path else file
    if not target.exists():
        return False
    return not heading or heading in {_anchor(line) for line in target.read_text(encoding="utf-8").splitlines()}


def _anchor(line: str) -> str:
    """What GitHub calls the place of a heading."""
    words = re.sub(r"[^\w\- ]", "", line.lstrip("#").strip().lower())
    return words.replace(" ", "-") if line.startswith("#") else ""


def _command_lines(text: str) -> Iterator[tuple[str, list[str]]]:
    """The stage and the flags of every `flexolmo …` in a block or between backticks."""
    joined = text.replace("\\\n", " ")
    command = r"(?:^|`|-- )(?:\.venv/bin/)?flexolmo ((?:contribution )?[a-z][\w-]*)([^`\n]*)"
    for match in re.finditer(command, joined, re.MULTILINE):
        yield match[1], re.findall(r"(?<=\s)(--[a-zA-Z][\w-]*)", match[2])


def _flags(stage: str) -> set[str]:
    flags = {flag.name for flag in STAGES[stage].flags if flag.name.startswith("-")}
    return flags | {"--json", "--debug", "--help"} | ({"--gin_file", "--gin"} if STAGES[stage].gin else set())
