"""Preparation: what comes out depends on the documents alone, however it was made."""

import gzip
import hashlib
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from flexolmo_jax import cli
from flexolmo_jax.data import runs, shards, text_task
from flexolmo_jax.data.mixture import Mixture
from flexolmo_jax.data.packing import Packing
from flexolmo_jax.data.preparation import Preparation
from flexolmo_jax.data.prepare import prepare, prepare_task
from flexolmo_jax.data.splits import SPLITS, split_of
from flexolmo_jax.data.text_task import TextTask
from flexolmo_jax.data.tokens import open_split
from flexolmo_jax.data.vocabulary import EOS_ID, decode, encode
from flexolmo_jax.data.workers import in_threads
from flexolmo_jax.errors import UserError
from tests.small import write_corpus


def write_lines(file: Path, texts) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    content = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    file.write_bytes(gzip.compress(content, mtime=0) if file.suffix == ".gz" else content)
    return file


def texts_of(prepared: Path, split: str) -> list[str]:
    documents = open_split(prepared, split)
    return [decode(documents[index].tolist()) for index in range(len(documents))]


def contents(directory: Path) -> dict[str, str]:
    return {
        str(file.relative_to(directory)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(directory.rglob("*"))
        if file.is_file()
    }


def task(files, **settings) -> TextTask:
    return TextTask(name="words", files=str(files), **settings)


def some_texts(count=400, seed=0):
    words = random.Random(seed)
    return [
        " ".join(words.choice(("sail", "reef", "tide", "lee")) for _ in range(words.randint(1, 40)))
        for _ in range(count)
    ]


def test_preparation_tokenizes_every_split_and_is_reused(tmp_path):
    corpus = write_corpus(tmp_path / "corpus", ["one", "zwölf"])
    prepared = prepare(corpus, tmp_path / "prepared")
    assert sorted(texts_of(prepared, "train")) == ["one", "zwölf"]
    assert all(open_split(prepared, "train")[index][-1] == EOS_ID for index in range(2))
    before = (prepared / "manifest.json").stat().st_mtime_ns
    prepare(corpus, tmp_path / "prepared")
    assert (prepared / "manifest.json").stat().st_mtime_ns == before
    (corpus / "train.jsonl").write_text('{"text": "changed"}\n')
    assert texts_of(prepare(corpus, tmp_path / "prepared"), "train") == ["changed"]
    assert prepare(prepared, tmp_path / "elsewhere") == prepared and not (tmp_path / "elsewhere").exists()


def test_the_manifest_counts_and_holds_no_text(tmp_path):
    texts = [*some_texts(50), "", "sail", "sail"]
    manifest = prepare_task(task(write_lines(tmp_path / "a.jsonl.gz", texts)), tmp_path / "out", Preparation())
    found = {split: texts_of(tmp_path / "out", split) for split in SPLITS}
    assert {text for each in found.values() for text in each} == {*texts} - {""}
    for split, each in found.items():
        assert all(split_of(text) == split for text in each)
        assert manifest["splits"][split]["documents"] == len(each)
        assert manifest["splits"][split]["tokens"] == sum(len(encode(text)) + 1 for text in each)
    assert (manifest["records"], manifest["empty"], manifest["bad"]) == (53, 1, 0)
    assert manifest["repeated"] == 52 - len({*texts} - {""})
    (source,) = manifest["sources"]
    assert source["sha256"] == hashlib.sha256((tmp_path / "a.jsonl.gz").read_bytes()).hexdigest()
    written = b"".join(file.read_bytes() for file in (tmp_path / "out").iterdir())
    assert b"sail" not in written
    assert not (tmp_path / "out.partial").exists()


def test_output_does_not_depend_on_files_order_parts_or_processes(tmp_path, monkeypatch):
    texts = some_texts()
    write_lines(tmp_path / "one/all.jsonl", texts)
    for number in range(4):
        write_lines(tmp_path / f"four/{9 - number}.jsonl.gz", texts[number::4])
    settings = {"shard_tokens": 9000, "deduplicate": "exact"}
    one = prepare_task(task(tmp_path / "one"), tmp_path / "a", Preparation(workers=1, **settings))
    monkeypatch.setattr(text_task, "PART_BYTES", 100)
    monkeypatch.setattr(runs, "_RUN_TOKENS", 2000)
    four = prepare_task(task(tmp_path / "four"), tmp_path / "b", Preparation(workers=1, **settings))
    monkeypatch.setattr("flexolmo_jax.data.prepare._SMALL_BYTES", 0)
    prepare_task(task(tmp_path / "four"), tmp_path / "c", Preparation(workers=2, **settings))
    prepare_task(task(tmp_path / "four"), tmp_path / "d", Preparation(**settings), workers=in_threads(3))
    assert one["splits"] == four["splits"] and len(one["splits"]["train"]["shards"]) > 3
    different = {"manifest.json"}
    a, b, c, d = (contents(tmp_path / name) for name in "abcd")
    assert {name: a[name] for name in a.keys() - different} == {name: b[name] for name in b.keys() - different}
    assert b == c == d


@pytest.mark.parametrize("kept", ["none", "exact", "near"])
def test_duplicates_go_as_asked(kept, tmp_path):
    words = random.Random(0)
    long = " ".join(str(words.randint(0, 9999)) for _ in range(200))
    twins = [long, long + " and one word more"]
    texts = [*some_texts(60), *["the same"] * 3, *twins]
    manifest = prepare_task(
        task(write_lines(tmp_path / "a.jsonl", texts)), tmp_path / "out", Preparation(deduplicate=kept)
    )
    found = [text for split in SPLITS for text in texts_of(tmp_path / "out", split)]
    if kept == "none":
        assert sorted(found) == sorted(texts) and manifest["repeated"] == manifest["similar"] == 0
    else:
        assert len(found) == len(set(found)) and manifest["repeated"] == len(texts) - len(set(texts))
    if kept == "near":
        assert len({*twins} & {*found}) == 1 and manifest["similar"] >= 1
        rank = [SPLITS.index(split_of(text)) for text in twins]
        (winner,) = {*twins} & {*found}
        assert SPLITS.index(split_of(winner)) == max(rank)
    else:
        assert {*twins} <= {*found}


def test_long_documents_are_stored_as_several(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "MOST_DOCUMENT_TOKENS", 10)
    (tmp_path / "a.txt").write_text("abcdefghijklmnopqrstuvw")
    (tmp_path / "train.txt").write_text("abcdefghijklmnopqrstuvw")
    documents = open_split(prepare(tmp_path, tmp_path / "out"), "train")
    assert [len(documents[index]) for index in range(len(documents))] == [10, 10, 4]
    assert decode(np.concatenate([documents[index] for index in range(3)]).tolist()) == "abcdefghijklmnopqrstuvw"


def test_bad_lines_are_skipped_up_to_the_stated_share(tmp_path):
    good = write_lines(tmp_path / "a.jsonl", some_texts(98)).read_bytes()
    (tmp_path / "a.jsonl").write_bytes(good + b"nonsense\n\xff\xfe\n")
    manifest = prepare_task(task(tmp_path / "a.jsonl", bad_share=0.02), tmp_path / "out", Preparation())
    assert (manifest["bad"], manifest["records"]) == (2, 100)
    assert [line.partition("a.jsonl ")[2] for line in manifest["bad_lines"]] == [
        "line 99 is not a JSON object with a field 'text'",
        "line 100 is not UTF-8 text (byte 0)",
    ]
    with pytest.raises(UserError, match=r"2 of 100 lines of words are bad.* the first: .*a\.jsonl line 99"):
        prepare_task(task(tmp_path / "a.jsonl", bad_share=0.019), tmp_path / "less", Preparation())
    assert not list(tmp_path.glob("less*"))


@pytest.mark.parametrize(
    "name, content, says",
    [
        ("x.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 500, mtime=0)[:-9], "cannot read"),
        ("x.jsonl", b"", "no document to train on"),
        ("x.jsonl", b'{"text": ""}\n', "no document to train on"),
        ("x.jsonl", b'{"text": "a"}\nnonsense\n', "line 2"),
        ("x.npy", b"\x03\x00\x04", "no whole number"),
    ],
)
def test_what_cannot_be_prepared_leaves_nothing(name, content, says, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=says):
        prepare(tmp_path / name, tmp_path / "deep" / "out")
    assert not list((tmp_path / "deep").iterdir())


def test_settings_refuse_what_makes_no_sense():
    for settings, says in (
        ({"shard_tokens": 0}, "shard_tokens"),
        ({"near_threshold": 1.5}, "near_threshold"),
        ({"workers": -1}, "workers"),
    ):
        with pytest.raises(UserError, match=says):
            Preparation(**settings)
    with pytest.raises(UserError, match="bad_share"):
        TextTask(name="a", files="b", bad_share=1.0)
    with pytest.raises(UserError, match=r"TextTask\.name"):
        TextTask(name="a b", files="b")


def test_the_stage_takes_three_lines_of_gin_and_replaces_nothing_unasked(tmp_path, capsys):
    write_lines(tmp_path / "letters/a.jsonl", some_texts(50))
    (tmp_path / "job.gin").write_text(
        f'include "configs/tasks/text.gin"\nNAME = "letters"\nFILES = "{tmp_path / "letters"}"\n'
    )
    words = ["prepare", f"--gin_file={tmp_path / 'job.gin'}", "--out", str(tmp_path / "out"), "--json"]
    assert cli.main(words) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["train_documents"] == len(open_split(tmp_path / "out", "train")) > 30
    assert cli.main(words) == 0
    assert cli.main([*words, '--gin.Preparation.deduplicate="none"']) == 2
    assert "holds other prepared text" in capsys.readouterr().err
    assert cli.main([*words, '--gin.Preparation.deduplicate="none"', "--overwrite"]) == 0


def test_a_mixture_is_written_by_the_stage(tmp_path, capsys):
    for name in "ab":
        prepare(write_lines(tmp_path / f"{name}.jsonl", some_texts(50, seed=ord(name))), tmp_path / "prepared" / name)
    rates = {str(tmp_path / "prepared" / name): rate for name, rate in (("a", 3.0), ("b", 1.0))}
    words = ["prepare", "--gin_file=configs/tasks/mixture.gin", "--out", str(tmp_path / "mixed")]
    assert cli.main([*words, f"--gin.RATES={rates!r}"]) == 0
    manifest = json.loads((tmp_path / "mixed/manifest.json").read_text())
    assert [(part["path"], part["rate"]) for part in manifest["parts"]] == [
        ("../prepared/a", 0.75),
        ("../prepared/b", 0.25),
    ]
    assert cli.main([*words, "--overwrite", f"--gin.RATES={dict.fromkeys(rates, 0)!r}"]) == 2
    assert "sum to zero" in capsys.readouterr().err


def test_what_is_no_prepared_text_is_never_replaced(tmp_path):
    text = task(write_lines(tmp_path / "a.jsonl", some_texts(50)))
    prepare_task(text, tmp_path / "prepared", Preparation())
    (tmp_path / "anchor" / "arrays").mkdir(parents=True)
    (tmp_path / "anchor" / "manifest.json").write_text('{"kind": "anchor", "format_version": 1}')
    before = contents(tmp_path / "anchor")
    with pytest.raises(UserError, match="is no prepared text"):
        prepare_task(text, tmp_path / "anchor", Preparation(), overwrite=True)
    for out in ("anchor", "prepared"):
        with pytest.raises(UserError, match="is no mixture"):
            Mixture(rates={str(tmp_path / "prepared"): 1.0}).write(tmp_path / out, overwrite=True)
    assert contents(tmp_path / "anchor") == before and not list(tmp_path.glob("*.partial"))


def test_a_shard_that_is_missing_is_named(tmp_path):
    prepared = prepare(write_lines(tmp_path / "a.jsonl", some_texts(50)), tmp_path / "out")
    next(prepared.glob("train-*.array_record")).unlink()
    with pytest.raises(UserError, match=r"train-00000-of-00001\.array_record is missing"):
        Packing(open_split(prepared, "train"), 16)


PREPARE = """
import sys
from pathlib import Path
from flexolmo_jax.data import prepare as module, text_task
from flexolmo_jax.data.preparation import Preparation
from flexolmo_jax.data.prepare import prepare_task
from flexolmo_jax.data.text_task import TextTask

module._SMALL_BYTES, text_task.PART_BYTES = 0, 2000
if __name__ == "__main__":
    task = TextTask(name="words", files=sys.argv[1])
    prepare_task(task, Path(sys.argv[2]), Preparation(workers=2, shard_tokens=10_000))
"""


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_killing_it_twenty_times_changes_nothing(tmp_path):
    """Each time a few more pieces of work are done, it is killed at whatever it is doing a random moment later."""
    for number in range(160):
        write_lines(tmp_path / f"text/{number}.jsonl.gz", some_texts(75, seed=number))
    (tmp_path / "run.py").write_text(PREPARE)
    command = [sys.executable, str(tmp_path / "run.py"), str(tmp_path / "text")]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}

    def start(out):
        return subprocess.Popen([*command, str(tmp_path / out)], env=environment)

    def pieces():
        return [file for part in ("runs", "reports") for file in tmp_path.glob(f"killed.partial/{part}/[!.]*.json")]

    moments = random.Random(1)
    kept: dict[Path, int] = {}
    for _ in range(20):
        enough = len(pieces()) + moments.randint(1, 3)
        process = start("killed")
        while len(pieces()) < enough:
            assert process.poll() is None, "it ended before it could be killed"
            time.sleep(0.005)
        time.sleep(moments.uniform(0, 0.05))
        process.kill()
        process.wait()
        finished = {piece: piece.stat().st_mtime_ns for piece in pieces()}
        assert kept.items() <= finished.items(), "a finished piece was done again"
        kept = finished
        assert not (tmp_path / "killed").exists()
    for out in ("killed", "whole"):
        assert start(out).wait() == 0
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    assert not (tmp_path / "killed.partial").exists()
