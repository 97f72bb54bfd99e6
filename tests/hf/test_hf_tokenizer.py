"""The exported tokenizer has the ids of the byte vocabulary and gives every text back."""

import hypothesis
import pytest
from hypothesis import strategies as st

from flexolmo_jax.data import vocabulary
from flexolmo_jax.hf.tokenizer import byte_tokenizer, write_tokenizer

TEXTS = [
    "",
    "def f(x):\n\treturn x  # two  spaces\r\n",
    "naïve Ünïcödé, 漢字, עברית, 🙂‍↔️",
    "\x00\x7f\u00ad\ufeff",
    "not an end: </s><pad><unk>",
]

RAW = byte_tokenizer()


@hypothesis.given(st.text())
def test_ids_are_those_of_the_vocabulary(text):
    RAW.encode_special_tokens = True
    ids = RAW.encode(text).ids
    assert ids == vocabulary.encode(text)
    assert RAW.decode(ids) == text


@hypothesis.given(st.lists(st.integers(3, vocabulary.VOCAB_SIZE - 1)))
def test_ill_formed_bytes_decode_like_the_vocabulary(ids):
    assert RAW.decode(ids) == vocabulary.decode(ids)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    transformers = pytest.importorskip("transformers")
    directory = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(directory)
    (directory / "config.json").write_text('{"model_type": "flex_olmo"}')
    return transformers.AutoTokenizer.from_pretrained(directory)


@pytest.mark.parametrize("text", TEXTS)
def test_auto_tokenizer_round_trip(loaded, text):
    ids = loaded(text)["input_ids"]
    assert ids == vocabulary.encode(text)
    assert loaded.decode(ids) == text


def test_auto_tokenizer_knows_the_special_ids(loaded):
    assert (loaded.pad_token_id, loaded.eos_token_id, loaded.unk_token_id) == (0, 1, 2)
    assert len(loaded) == vocabulary.VOCAB_SIZE
    assert loaded.decode([vocabulary.EOS_ID, *vocabulary.encode("é")], skip_special_tokens=True) == "é"
    padded = loaded(["a", "abc"], padding=True)
    assert padded["input_ids"][0] == [*vocabulary.encode("a"), 0, 0]
    assert padded["attention_mask"][0] == [1, 0, 0]
