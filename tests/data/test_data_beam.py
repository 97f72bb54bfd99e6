"""A Beam pipeline of several workers makes what one process makes."""

import json
import random

import pytest

from flexolmo_jax import cli
from flexolmo_jax.data.preparation import Preparation
from flexolmo_jax.data.prepare import prepare_task
from flexolmo_jax.data.text_task import TextTask
from tests.data.test_data_prepare import contents

pytestmark = pytest.mark.slow


@pytest.fixture
def text(tmp_path):
    words = random.Random(0)
    (tmp_path / "text").mkdir()
    for number in range(4):
        texts = [" ".join(words.choices(("sail", "reef", "tide"), k=words.randint(1, 30))) for _ in range(50)]
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        (tmp_path / f"text/{number}.jsonl").write_text(lines)
    return tmp_path / "text"


def words(text, out):
    runner = "--runner=DirectRunner --direct_running_mode=multi_processing --direct_num_workers=2"
    gin = [f'--gin.{name}="{value}"' for name, value in (("NAME", "words"), ("FILES", text))]
    return [
        "prepare",
        "--gin_file=configs/tasks/text.gin",
        *gin,
        "--gin.Preparation.shard_tokens=2000",
        f"--out={out}",
        f"--beam={runner}",
    ]


def test_several_workers_make_the_same_shards(text, tmp_path):
    pytest.importorskip("apache_beam")
    assert cli.main(words(text, tmp_path / "beam")) == 0
    prepare_task(TextTask(name="words", files=str(text)), tmp_path / "alone", Preparation(shard_tokens=2000))
    assert contents(tmp_path / "beam") == contents(tmp_path / "alone")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["alone", "beam", "text"]


def test_what_a_worker_refuses_is_one_sentence(text, tmp_path, capsys):
    pytest.importorskip("apache_beam")
    (text / "2.jsonl").write_text("nonsense\n")
    assert cli.main(words(text, tmp_path / "beam")) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert "2.jsonl line 1 is not a JSON object" in said and "Traceback" not in said
    assert [entry.name for entry in tmp_path.iterdir()] == ["text"]
