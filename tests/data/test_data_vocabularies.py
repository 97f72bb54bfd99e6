"""Vocabularies give the ids of the libraries they stand for."""

import json

import numpy as np
import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from flexolmo_jax.data.vocabularies import SavedVocabulary, id_type, open_vocabulary
from flexolmo_jax.data.vocabulary import EOS_ID, decode, encode
from flexolmo_jax.errors import UserError

TEXTS = ["the cat sat on the mat", "", "naïve 中文 text", "a\nb\n\n  c", "<|endoftext|> in the middle"]


@pytest.fixture(scope="session")
def tokenizer_json(tmp_path_factory):
    """A byte-level BPE like dolma2, trained on a few words."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>", "<|pad|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the cat sat on the mat and the dog on the log"] * 20, trainer)
    file = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer.save(str(file))
    return file


@pytest.fixture(scope="session")
def sentencepiece_model(tmp_path_factory):
    directory = tmp_path_factory.mktemp("sentencepiece")
    (directory / "text").write_text("\n".join(f"the cat number {n} sat on mat {n * 7}" for n in range(300)))
    sentencepiece.SentencePieceTrainer.train(
        input=str(directory / "text"), model_prefix=str(directory / "small"), vocab_size=90, minloglevel=9
    )
    return directory / "small.model"


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=40))
def test_bytes_round_trip(text):
    assert decode([*encode(text), EOS_ID, 77]) == text
    (ids,) = open_vocabulary("bytes").encode([text])
    assert ids.tolist() == encode(text)


def test_ids_of_a_tokenizer_json_are_the_librarys(tokenizer_json):
    vocabulary = open_vocabulary(str(tokenizer_json))
    library = Tokenizer.from_file(str(tokenizer_json))
    assert [ids.tolist() for ids in vocabulary.encode(TEXTS)] == [library.encode(text).ids for text in TEXTS]
    assert vocabulary.size == library.get_vocab_size() and vocabulary.eos_id == 0 and vocabulary.pad_id == 1
    for text in TEXTS[:-1]:
        assert vocabulary.decode([*vocabulary.encode([text])[0], vocabulary.eos_id, 5]) == text


def test_ids_of_a_sentencepiece_model_are_the_librarys(sentencepiece_model):
    vocabulary = open_vocabulary(str(sentencepiece_model))
    library = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_model))
    assert [ids.tolist() for ids in vocabulary.encode(TEXTS)] == [library.encode(text) for text in TEXTS]
    assert vocabulary.eos_id == library.eos_id() and vocabulary.size == 90
    assert vocabulary.decode([*vocabulary.encode([TEXTS[0]])[0], vocabulary.eos_id, 7]) == TEXTS[0]


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=40))
def test_the_bytes_of_a_texts_ids_are_its_own(tokenizer_json, text):
    for name in ("bytes", str(tokenizer_json)):
        vocabulary = open_vocabulary(name)
        (ids,) = vocabulary.encode([text])
        assert vocabulary.text_bytes()[ids].sum() == len(text.encode())
        assert len(vocabulary.text_bytes()) == vocabulary.size
        assert vocabulary.text_bytes()[[vocabulary.eos_id, vocabulary.pad_id]].sum() == 0


def test_the_bytes_of_sentencepieces_are_those_of_the_text_and_a_space_before_it(sentencepiece_model):
    vocabulary = open_vocabulary(str(sentencepiece_model))
    for text in ("the cat sat on mat", "number 77"):
        (ids,) = vocabulary.encode([text])
        assert vocabulary.text_bytes()[ids].sum() == 1 + len(text)
    assert vocabulary.text_bytes()[vocabulary.eos_id] == 0


def test_what_is_carried_along_is_the_same_vocabulary(tokenizer_json, sentencepiece_model, tmp_path):
    for name in (str(tokenizer_json), str(sentencepiece_model)):
        vocabulary = open_vocabulary(name)
        directory = tmp_path / vocabulary.fingerprint[:5]
        vocabulary.save(directory)
        saved = SavedVocabulary(vocabulary.fingerprint, directory)
        assert saved.open().fingerprint == vocabulary.fingerprint and saved.open().eos_id == vocabulary.eos_id
        with pytest.raises(UserError, match="does not hold the tokenizer other"):
            SavedVocabulary("other", directory).open()
    assert SavedVocabulary().open().fingerprint == "bytes"


def test_a_fingerprint_tells_the_rules_and_not_the_file(tokenizer_json, tmp_path):
    content = json.loads(tokenizer_json.read_text())
    (tmp_path / "same.json").write_text(json.dumps(content | {"truncation": None}, indent=3))
    content["model"]["merges"].pop()
    (tmp_path / "other.json").write_text(json.dumps(content))
    prints = [
        open_vocabulary(str(file)).fingerprint
        for file in (tokenizer_json, tmp_path / "same.json", tmp_path / "other.json")
    ]
    assert prints[0] == prints[1] != prints[2]


def test_the_end_of_text_is_told_found_or_asked_for(tokenizer_json, tmp_path):
    content = json.loads(tokenizer_json.read_text())
    for token in content["added_tokens"]:
        token["content"] = {"<|endoftext|>": "<stop>", "<|pad|>": "<fill>"}[token["content"]]
    content["model"]["vocab"] = {
        {"<|endoftext|>": "<stop>", "<|pad|>": "<fill>"}.get(name, name): number
        for name, number in content["model"]["vocab"].items()
    }
    file = tmp_path / "tokenizer.json"
    file.write_text(json.dumps(content))
    with pytest.raises(UserError, match="which token ends a text"):
        open_vocabulary(str(file))
    with pytest.raises(UserError, match="no token '<stopp>'; did you mean '<stop>'"):
        open_vocabulary(str(file), "<stopp>")
    assert open_vocabulary(str(file), "<stop>").eos_id == 0
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": {"content": "<fill>"}}')
    open_vocabulary.cache_clear()
    assert open_vocabulary(str(file)).eos_id == 1


@pytest.mark.parametrize("name, content", [("x.json", b"{}"), ("x.json", b"no json"), ("x.model", b"no model")])
def test_a_damaged_tokenizer_is_refused_in_one_sentence(name, content, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match="can be read") as refusal:
        open_vocabulary(str(tmp_path / name))
    assert "\n" not in str(refusal.value) and name in str(refusal.value)


def test_a_tokenizer_that_is_not_there_is_named():
    with pytest.raises(UserError, match=r"no tokenizer 'nowhere\.json'"):
        open_vocabulary("nowhere.json")


def test_ids_take_two_bytes_where_they_fit():
    assert [id_type(size).itemsize for size in (259, 2**16, 2**16 + 1, 100_278)] == [2, 2, 4, 4]
    assert np.dtype(id_type(100_278)) == np.uint32
