"""SeqIO's registry and ours say the same. Importing SeqIO takes seconds, so these tests are slow."""

import json
import random

import numpy as np
import pytest

from flexolmo_jax import cli
from flexolmo_jax.data.documents import read_documents
from flexolmo_jax.data.preparation import Preparation
from flexolmo_jax.data.prepare import prepare_task
from flexolmo_jax.data.text_task import TextTask
from flexolmo_jax.data.tokens import open_split
from tests.data.test_data_vocabularies import sentencepiece_model, tokenizer_json  # noqa: F401

pytestmark = pytest.mark.slow


def write(tmp_path, count=80):
    words = random.Random(3)
    texts = [
        " ".join(words.choice(("sail", "reef", "中文")) for _ in range(words.randint(1, 30))) for _ in range(count)
    ]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return tmp_path / "text.jsonl"


@pytest.mark.parametrize("kind", ["bytes", "tokenizer_json", "sentencepiece_model"])
def test_a_task_gives_seqio_the_ids_that_preparation_writes(kind, tmp_path, request):
    from flexolmo_jax.data.tasks import register

    tokenizer = kind if kind == "bytes" else str(request.getfixturevalue(kind))
    task = TextTask(name=f"words_{kind}", files=str(write(tmp_path)), tokenizer=tokenizer)
    prepare_task(task, tmp_path / "out", Preparation(deduplicate="none"))
    registered = register(task)
    for split in ("train", "validation", "test"):
        examples = registered.get_dataset(None, split=split, shuffle=False).as_numpy_iterator()
        prepared = open_split(tmp_path / "out", split)
        assert sorted(example["targets"].tolist() for example in examples) == sorted(
            prepared[index].tolist() for index in range(len(prepared))
        )
        assert len(prepared) > 0


def test_token_arrays_are_a_task_too(tmp_path):
    from flexolmo_jax.data.tasks import register

    expected = [list(range(3, 3 + length)) for length in range(1, 40)]
    ids = np.array([token for document in expected for token in [*document, 1]], np.uint16)
    (tmp_path / "train.npy").write_bytes(ids.tobytes())
    task = register(TextTask(name="arrays", files=str(tmp_path)))
    found = [
        each["targets"].tolist() for each in task.get_dataset(None, split="train", shuffle=False).as_numpy_iterator()
    ]
    assert found == [[*document, 1] for document in expected]


MODULE = """
import seqio
from flexolmo_jax.data import tasks
from flexolmo_jax.data.text_task import TextTask

for name in ("left", "right"):
    tasks.register(TextTask(name=name, files={files!r}))
seqio.TaskRegistry.add(
    "lines",
    source=seqio.TextLineDataSource({{"train": {lines!r}}}),
    preprocessors=[
        lambda dataset: dataset.map(lambda line: {{"targets": line}}),
        seqio.preprocessors.tokenize,
        seqio.preprocessors.append_eos,
    ],
    output_features={{"targets": seqio.Feature(seqio.ByteVocabulary(), add_eos=True)}},
)
seqio.MixtureRegistry.add("both", [("left", 3.0), ("right", 1.0)])
"""


def test_registered_tasks_and_mixtures_are_prepared(tmp_path, monkeypatch, capsys):
    text = write(tmp_path)
    (tmp_path / "lines.txt").write_text("".join(f"line number {n}\n" for n in range(100)))
    (tmp_path / "owner_tasks.py").write_text(MODULE.format(files=str(text), lines=str(tmp_path / "lines.txt")))
    monkeypatch.chdir(tmp_path)
    assert cli.main(["prepare-seqio", "owner_tasks:lines", "--out", "lines", "--workers", "1"]) == 0
    documents = [open_split(tmp_path / "lines", split) for split in ("train", "validation", "test")]
    assert sum(map(len, documents)) == 100 and all(map(len, documents))
    assert cli.main(["prepare-seqio", "owner_tasks:both", "--out", "both", "--workers", "1"]) == 0
    manifest = json.loads((tmp_path / "both/manifest.json").read_text())
    assert {part["path"]: part["rate"] for part in manifest["parts"]} == {"left": 0.75, "right": 0.25}
    total = sum(len(open_split(tmp_path / "both/left", split)) for split in ("train", "validation", "test"))
    assert total == len(set(read_documents([text])))
    capsys.readouterr()
    for wrong, says in (
        ("owner_tasks:line", "did you mean 'lines'"),
        ("nowhere:x", "no module 'nowhere'"),
        ("x", "MODULE:NAME"),
    ):
        assert cli.main(["prepare-seqio", wrong, "--out", "none"]) == 2
        assert says in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_the_built_in_corpora_are_registered(tmp_path, monkeypatch):
    import seqio

    from flexolmo_jax.data import tasks

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    task = seqio.get_mixture_or_task("flexolmo_unicode")
    (example, *_) = task.get_dataset(None, split="test", shuffle=False).take(1).as_numpy_iterator()
    assert tasks.open_vocabulary("bytes").decode(example["targets"]).startswith("U+")
    assert {each.name for each in seqio.get_mixture_or_task("flexolmo_demo").tasks} == {
        f"flexolmo_{name}" for name in ("public", "code", "math", "unicode")
    }
