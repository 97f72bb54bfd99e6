"""The built-in corpora, decoys and proxies."""

import gzip
import json

import numpy as np
import pytest

from flexolmo_jax.data import builtin
from flexolmo_jax.data.decoys import Decoys
from flexolmo_jax.data.documents import read_documents
from flexolmo_jax.data.packing import Packing
from flexolmo_jax.data.proxies import select_proxies
from flexolmo_jax.data.tokens import Documents
from flexolmo_jax.data.vocabulary import EOS_ID, encode
from flexolmo_jax.errors import UserError
from tests.data.counting import documents


def test_decoys_are_fixed_rows_that_use_known_ids_and_repeat_no_document():
    public, own = Packing(documents(*[30] * 20), 19), Packing(documents(*[25] * 20), 19)
    decoys = Decoys(public, own, seed=1)
    known = set(range(3, 603))
    for index in range(6):
        rows = decoys[index]
        np.testing.assert_array_equal(rows.inputs, Decoys(public, own, seed=1)[index].inputs)
        np.testing.assert_array_equal(rows.targets[:-1], rows.inputs[1:])
        assert set(rows.inputs.tolist()) <= known | {0}
        assert not np.array_equal(rows.inputs, public[index].inputs)
    assert not np.array_equal(decoys[0].inputs, Decoys(public, own, seed=2)[0].inputs)


def test_proxies_are_the_public_documents_most_like_the_owners(tmp_path):
    def prepared(texts):
        tokens = [np.array([*encode(text), EOS_ID], np.uint16) for text in texts]
        return Documents(np.concatenate(tokens), np.concatenate([[0], np.cumsum([len(t) for t in tokens])]))

    prose = [f"the cat number {n} sat on a mat and slept" for n in range(30)]
    hidden = ["12 + 30 = 42", "7 + 8 = 15"]
    own = prepared([f"{a} + {b} = {a + b}" for a in range(9) for b in range(9)])
    assert select_proxies(own, prepared(prose + hidden), tmp_path / "proxies", share=2 / 32) == 2
    with gzip.open(tmp_path / "proxies/train.jsonl.gz", "rt") as file:
        assert sorted(json.loads(line)["text"] for line in file) == sorted(hidden)
    with pytest.raises(UserError, match="share of proxies"):
        select_proxies(own, own, tmp_path / "none", share=0)


@pytest.mark.slow
def test_builtin_corpora_are_deterministic_deduplicated_and_disjoint(tmp_path):
    builtin.build(tmp_path / "first")
    builtin.build(tmp_path / "second")
    for name in ("public", "code", "math", "unicode"):
        seen: dict[str, str] = {}
        for split in ("train", "validation", "test"):
            file = tmp_path / "first" / name / f"{split}.jsonl.gz"
            assert file.read_bytes() == (tmp_path / "second" / name / f"{split}.jsonl.gz").read_bytes()
            texts = list(read_documents([file]))
            assert len(texts) > 50
            entries = texts if name in ("public", "code") else [entry for text in texts for entry in _entries(text)]
            for entry in set(entries):
                assert seen.setdefault(entry, split) == split, entry
        assert len(seen) > 1000


def _entries(text: str) -> list[str]:
    return text.split("Q: ")[1:] if text.startswith("Q: ") else text.splitlines()
