"""A road with a tokenizer of its own: whatever is made of the anchor carries it, and text is measured by its bytes."""

import json
import math

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer

import flexolmo_jax as fo
from flexolmo_jax import cli
from flexolmo_jax.data.preparation import Preparation
from flexolmo_jax.data.prepare import prepare_task
from flexolmo_jax.data.text_task import TextTask
from flexolmo_jax.errors import UserError
from flexolmo_jax.evaluate import evaluate
from flexolmo_jax.hf import export_hf
from flexolmo_jax.merge import merge
from flexolmo_jax.model import InitialScales
from flexolmo_jax.train.pretrain import pretrain
from tests.small import write_corpus
from tests.train.test_train_jobs import COMMON, MODEL, PROSE, SUMS, expert

END = "<|endoftext|>"


@pytest.fixture(scope="module")
def road(tmp_path_factory):
    """A byte-level BPE, an anchor trained on text that was prepared with it, and a merge with an expert on raw text."""
    root = tmp_path_factory.mktemp("road")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=262, special_tokens=[END], initial_alphabet=alphabet, show_progress=False, min_frequency=1
    )
    tokenizer.train_from_iterator(PROSE, trainer)
    tokenizer.save(str(root / "tokenizer.json"))
    write_corpus(root / "public", PROSE)
    write_corpus(root / "math", SUMS)
    task = TextTask(name="public", files=str(root / "public"), tokenizer=str(root / "tokenizer.json"))
    prepare_task(task, root / "prepared", Preparation(workers=1))
    pretrain(out=root / "anchor", text=root / "prepared", model=MODEL, scales=InitialScales(), **COMMON)
    expert(root, root / "owner")
    merge(root / "anchor/anchor", [root / "owner/contribution"], root / "merged")
    return root


def test_every_model_carries_it(road, capsys):
    for directory in (road / "anchor/anchor", road / "merged"):
        model = fo.load(directory)
        assert (
            model.vocabulary.encode(["lazy dog"])[0].tolist()
            == Tokenizer.from_file(str(road / "tokenizer.json")).encode("lazy dog").ids
        )
    assert cli.main(["generate", str(road / "merged"), "--prompt", "The quick", "--max_new_tokens", "4", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["text"].startswith("The quick")


def test_raw_text_is_measured_in_bits_per_byte_of_its_text(road, tmp_path):
    found = evaluate(checkpoints=(road / "anchor/anchor",), corpora={"public": road / "public"}, out=tmp_path / "out")
    model = fo.load(road / "anchor/anchor")
    nats, text_bytes = 0.0, 0
    for line in (road / "public/test.jsonl").read_text().splitlines():
        (ids,) = model.vocabulary.encode([json.loads(line)["text"]])
        ids = np.append(ids, model.vocabulary.eos_id)
        logits = np.asarray(model(ids[None, :-1]), np.float64)[0]
        logits -= np.log(np.exp(logits - logits.max()).sum(axis=-1, keepdims=True)) + logits.max()
        nats -= logits[np.arange(len(ids) - 1), ids[1:]].sum()
        text_bytes += len(model.vocabulary.decode(ids[1:].tolist()).encode())
    assert found["models"]["public"]["public"] == pytest.approx(nats / math.log(2) / text_bytes, rel=1e-4)


def test_text_in_another_tokenizer_is_refused(road, tmp_path):
    prepare_task(TextTask(name="public", files=str(road / "public")), tmp_path / "bytes", Preparation(workers=1))
    with pytest.raises(UserError, match="was prepared with the tokenizer bytes, but the models' is"):
        evaluate(checkpoints=(road / "merged",), corpora={"public": tmp_path / "bytes"}, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_export_has_it(road, tmp_path):
    export_hf(road / "merged", tmp_path / "hf", drop_bias=True)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    text = "The lazy dog 中文"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.eos_token == END
    assert json.loads((tmp_path / "hf/config.json").read_text())["eos_token_id"] == tokenizer.eos_token_id
