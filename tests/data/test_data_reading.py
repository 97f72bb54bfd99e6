"""Order and mixture of rows: pure functions of seed, step and row, whoever reads them."""

import json
import subprocess
import sys

import numpy as np
import pytest

from flexolmo_jax.data.mixture import MixedRows, Mixture, open_rows
from flexolmo_jax.data.packing import Packing
from flexolmo_jax.data.prepare import prepare
from flexolmo_jax.data.reading import batches, read_from
from flexolmo_jax.data.splits import split_of
from flexolmo_jax.data.tokens import open_split
from flexolmo_jax.data.vocabulary import decode
from flexolmo_jax.errors import UserError
from tests.data.counting import documents

RATES = {"a": 0.5, "b": 0.3, "c": 0.15, "d": 0.05}


def test_a_batch_is_a_function_of_seed_and_step_and_holds_exact_shares():
    sources = {0: Packing(documents(*[20] * 50), 19), 1: Packing(documents(*[20] * 30), 19)}
    dataset = batches(sources, {0: 0.75, 1: 0.25}, 8, seed=3)
    for step, batch in zip(range(40, 50), read_from(dataset, 40), strict=False):
        again = batches(sources, {0: 0.75, 1: 0.25}, 8, seed=3)[step]
        np.testing.assert_array_equal(batch.rows.inputs, again.rows.inputs)
        assert batch.source.tolist().count(1) == 2
    other = batches(sources, {0: 0.75, 1: 0.25}, 8, seed=4)[40]
    assert not np.array_equal(other.rows.inputs, dataset[40].rows.inputs)


def test_every_row_comes_once_an_epoch_and_epochs_differ():
    packing = Packing(documents(*[20] * 24), 19)
    dataset = batches({0: packing}, {0: 1.0}, 8, seed=0)
    epochs = [[int(row[0]) for step in range(3 * e, 3 * e + 3) for row in dataset[step].rows.inputs] for e in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(int(packing[i].inputs[0]) for i in range(24))
    assert epochs[0] != epochs[1]


def test_processes_read_their_own_rows_of_the_same_batches():
    dataset = batches({0: Packing(documents(*[20] * 50), 19)}, {0: 1.0}, 8, seed=1)
    for hosts in (1, 2, 4):
        share = 8 // hosts
        readers = [read_from(dataset, 5, range(host * share, (host + 1) * share)) for host in range(hosts)]
        for step in range(5, 9):
            parts = [next(reader) for reader in readers]
            joined = np.concatenate([part.rows.inputs for part in parts])
            np.testing.assert_array_equal(joined, dataset[step].rows.inputs)


READER = """
import sys, numpy as np
from pathlib import Path
from flexolmo_jax.data.packing import Packing
from flexolmo_jax.data.tokens import open_split
from flexolmo_jax.data.reading import batches, read_from

prepared, out, first, last, host, hosts = sys.argv[1:]
dataset = batches({0: Packing(open_split(Path(prepared), "train"), 24)}, {0: 1.0}, 8, seed=7)
share = 8 // int(hosts)
mine = range(int(host) * share, (int(host) + 1) * share)
for step, batch in zip(range(int(first), int(last)), read_from(dataset, int(first), mine)):
    np.save(f"{out}/{step}-{mine.start}.npy", batch.rows.inputs)
"""


@pytest.mark.slow
def test_hosts_may_come_and_go_in_the_middle_of_a_run(tmp_path):
    """Four processes, then two that take over after a kill, then one: the batches of one process that did it all."""
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps({"text": f"text {n} " * 3}) + "\n" for n in range(200)))
    prepared = prepare(tmp_path / "corpus.jsonl", tmp_path / "prepared")
    Packing(open_split(prepared, "train"), 24)

    def read(name, first, last, hosts):
        (tmp_path / name).mkdir(exist_ok=True)
        command = [sys.executable, "-c", READER, str(prepared), str(tmp_path / name), str(first), str(last)]
        return [subprocess.Popen([*command, str(host), str(hosts)]) for host in range(hosts)]

    def joined(name, step):
        parts = sorted(tmp_path.glob(f"{name}/{step}-*.npy"), key=lambda file: int(file.stem.split("-")[1]))
        return np.concatenate([np.load(part) for part in parts])

    whole = read("whole", 0, 12, 1)
    killed = read("killed", 0, 10**9, 4)
    while not all(list(tmp_path.glob(f"killed/3-{row}.npy")) for row in (0, 2, 4, 6)):
        assert all(process.poll() is None for process in killed)
    for process in killed:
        process.kill()
        process.wait()
    later = [*read("two", 4, 8, 2), *read("one", 8, 12, 1)]
    assert [process.wait() for process in [*whole, *later]] == [0] * 4
    for name, steps in (("killed", range(4)), ("two", range(4, 8)), ("one", range(8, 12))):
        for step in steps:
            np.testing.assert_array_equal(joined(name, step), np.load(tmp_path / f"whole/{step}-0.npy"))


def mixture(tmp_path, rates=RATES):
    """Four texts of different sizes, prepared, and the mixture of them."""
    for number, name in enumerate(rates):
        texts = [f"{name}{n:05}-" + "x" * (n % 20) for n in range(100 * (number + 1))]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        prepare(tmp_path / f"{name}.jsonl", tmp_path / "prepared" / name)
    Mixture(rates={str(tmp_path / "prepared" / name): rate for name, rate in rates.items()}).write(tmp_path / "mixed")
    return tmp_path / "mixed"


def test_a_mixture_has_exact_rates_in_any_window_and_no_held_out_document(tmp_path):
    rows = open_rows(mixture(tmp_path), "train", lambda documents: Packing(documents, 31))
    dataset = batches({3: rows}, {3: 1.0}, 100, seed=0)
    read = [dataset[step] for step in range(100)]
    assert all((batch.source == 3).all() for batch in read)
    inputs = np.concatenate([batch.rows.inputs for batch in read])
    names = [chr(first - 3) for first in inputs[:, 0].tolist()]
    seen = set()
    for row in np.unique(inputs, axis=0):
        seen |= {decode(piece.tolist()) for piece in np.split(row, np.flatnonzero(row == 1) + 1) if len(piece) > 1}
    for name, rate in RATES.items():
        assert abs(names.count(name) / len(names) - rate) < 0.005
        counts = np.cumsum([0, *(each == name for each in names)])
        assert abs((counts[500:] - counts[:-500]) - 500 * rate).max() <= 2
    whole = {text for text in seen if "-" in text and len(text) < 31}
    assert len(whole) > 500
    held_out = {
        text
        for number, name in enumerate(RATES)
        for n in range(100 * (number + 1))
        if split_of(text := f"{name}{n:05}-" + "x" * (n % 20)) != "train"
    }
    assert len(held_out) > 100 and not whole & held_out


def test_the_pattern_of_a_mixture_can_be_sampled_like_any_rows():
    small, large = Packing(documents(*[20] * 10), 19), Packing(documents(*[20] * 90), 19)
    rows = MixedRows([(small, 0.5), (large, 0.5)])
    assert len(rows) == 180
    firsts = [int(rows[index].inputs[0]) for index in range(180)]
    assert {first for first in firsts if firsts.count(first) == 9} < {int(small[i].inputs[0]) for i in range(10)}
    with pytest.raises(IndexError):
        rows[180]


def test_a_mixture_refuses_what_cannot_be_mixed(tmp_path):
    with pytest.raises(UserError, match="sum to zero"):
        Mixture(rates={"a": 0.0, "b": 0.0})
    with pytest.raises(UserError, match="rate of a is -1"):
        Mixture(rates={"a": -1.0, "b": 2.0})
    with pytest.raises(UserError, match="no prepared text"):
        Mixture(rates={str(tmp_path): 1.0}).write(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="is a mixture"):
        open_split(mixture(tmp_path, {"a": 1.0}), "train")
