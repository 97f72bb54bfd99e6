"""The built-in corpora and decoys."""

import numpy as np
import pytest

from flexolmo_jax.data import builtin
from flexolmo_jax.data.decoys import Decoys
from flexolmo_jax.data.documents import read_documents
from flexolmo_jax.data.packing import Packing
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


def test_two_of_four_decoys_hold_pieces_of_the_owners_text():
    public, own = Packing(documents(*[30] * 20), 29), Packing(documents(*[25] * 20), 24)
    decoys = Decoys(public, own, seed=1)

    def consecutive(index: int) -> int:  # in the documents every id is the one after the last
        return int(np.sum(np.diff(decoys[index].inputs) == 1))

    plain, spliced = (sum(map(consecutive, pair)) for pair in ((0, 1, 4, 5), (2, 3, 6, 7)))
    assert spliced >= plain + 4


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
