"""safetensors files by byte range: against the safetensors library, and against files that lie."""

import json
import os

import hypothesis
import ml_dtypes
import numpy as np
import pytest
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from flexolmo_jax.errors import UserError
from flexolmo_jax.hf import safetensors_file
from flexolmo_jax.hf.matrices import is_finite, transposed
from flexolmo_jax.hf.safetensors_file import SafetensorsFile

DTYPES = (np.float32, ml_dtypes.bfloat16, np.float16)
TENSORS = st.dictionaries(
    st.text(min_size=1, max_size=6).filter(lambda name: name != "__metadata__"),
    st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 5), max_size=3)),
    min_size=1,
    max_size=5,
)


def filled(tensors):
    random = np.random.default_rng(0)
    return {name: np.asarray(random.normal(size=shape)).astype(dtype) for name, (dtype, shape) in tensors.items()}


def announced(arrays):
    return {name: (array.dtype, array.shape) for name, array in arrays.items()}


@hypothesis.given(TENSORS)
@hypothesis.settings(max_examples=40, deadline=None)
def test_the_library_reads_what_is_written(tmp_path_factory, tensors):
    file, arrays = tmp_path_factory.mktemp("written") / "model.safetensors", filled(tensors)
    noted = safetensors_file.write(file, announced(arrays), iter(arrays.values()))
    found = load_file(file)
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape)
        assert found[name].tobytes() == array.tobytes()
    assert noted == safetensors_file.digest(file)
    assert noted["bytes"] == os.stat(file).st_size


@hypothesis.given(TENSORS, st.data())
@hypothesis.settings(max_examples=40, deadline=None)
def test_what_the_library_writes_is_read(tmp_path_factory, tensors, data):
    file, arrays = tmp_path_factory.mktemp("read") / "model.safetensors", filled(tensors)
    save_file(arrays, file)
    opened = SafetensorsFile(file)
    assert opened.tensors.keys() == arrays.keys()
    for name, array in arrays.items():
        assert opened.read(name).tobytes() == array.tobytes()
        assert (opened.dtype(name), opened.shape(name)) == (array.dtype, array.shape)
        if array.ndim and len(array):
            start = data.draw(st.integers(0, len(array) - 1))
            stop = data.draw(st.integers(start + 1, len(array)))
            part = opened.read(name, start, stop)
            assert part.shape == (stop - start, *array.shape[1:])
            assert part.tobytes() == array[start:stop].tobytes()


def header(entries: dict, body: bytes = b"") -> bytes:
    encoded = json.dumps(entries).encode()
    return len(encoded).to_bytes(8, "little") + encoded + body


ONE = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}

LIES = {
    "empty": b"",
    "shorter than a length": b"\x00\x00",
    "no header": (0).to_bytes(8, "little"),
    "a header of 2^63 bytes": (2**63).to_bytes(8, "little") + b"{}",
    "a header of 90 MB in a small file": (90_000_000).to_bytes(8, "little") + b"{}",
    "no JSON": header({})[:8] + b"[}",
    "a list": header([1, 2]),
    "nested beyond recursion": (200_000).to_bytes(8, "little") + b"[" * 200_000,
    "a tensor that is a number": header({"a": 3}),
    "without a dtype": header({"a": {"shape": [2], "data_offsets": [0, 8]}}, bytes(8)),
    "a negative offset": header({"a": ONE | {"data_offsets": [-8, 0]}}, bytes(8)),
    "an offset that is no integer": header({"a": ONE | {"data_offsets": [0, 8.0]}}, bytes(8)),
    "a shape that is true": header({"a": ONE | {"shape": [True, 2]}}, bytes(8)),
    "a size that is not the shape's": header({"a": ONE | {"shape": [3]}}, bytes(8)),
    "a huge shape": header({"a": ONE | {"shape": [2**40, 2**40]}}, bytes(8)),
    "backwards": header({"a": {"dtype": "I64", "shape": [1], "data_offsets": [8, 0]}}, bytes(8)),
    "bytes missing": header({"a": ONE}, bytes(7)),
    "bytes left over": header({"a": ONE}, bytes(9)),
    "overlap": header({"a": ONE, "b": ONE | {"data_offsets": [4, 12]}}, bytes(12)),
    "a gap": header({"a": ONE, "b": ONE | {"data_offsets": [12, 20]}}, bytes(20)),
    "twice the same name": header({"a": ONE, "b": ONE}).replace(b'"b"', b'"a"') + bytes(8),
}


@pytest.mark.parametrize("lie", LIES)
def test_files_that_lie_are_refused(lie, tmp_path):
    file = tmp_path / "model.safetensors"
    file.write_bytes(LIES[lie])
    with pytest.raises(UserError, match="is not a whole safetensors file"):
        SafetensorsFile(file)


@hypothesis.given(st.data())
@hypothesis.settings(max_examples=150, deadline=None)
def test_a_damaged_file_is_refused_or_reads_in_bounds(tmp_path_factory, data):
    """A byte that is changed in the header never makes a read leave the file or take more memory than it has."""
    file = tmp_path_factory.mktemp("damaged") / "model.safetensors"
    save_file({"a": np.arange(6, dtype=np.float32), "b": np.ones((2, 3), np.float16)}, file)
    content = bytearray(file.read_bytes())
    length = int.from_bytes(content[:8], "little")
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, 7 + length))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, 20))
    file.write_bytes(content[: len(content) - cut])
    try:
        opened = SafetensorsFile(file)
        for name in opened.tensors:
            assert opened.read(name).nbytes <= len(content)
    except UserError as error:
        assert str(file) in str(error)


def test_a_file_that_changes_meanwhile_is_noticed(tmp_path):
    file = tmp_path / "model.safetensors"
    save_file({"a": np.ones(100, np.float32)}, file)
    opened = SafetensorsFile(file)
    os.truncate(file, 300)
    with pytest.raises(UserError, match="was changed while a was read"):
        opened.read("a")
    save_file({"a": np.ones(100, np.float32)}, file)
    opened = SafetensorsFile(file)
    file.unlink()
    save_file({"a": np.zeros(100, np.float32)}, file)
    os.utime(file, (0, 0))
    with pytest.raises(UserError, match="was changed while a was read"):
        opened.read("a")


@hypothesis.given(st.integers(0, 300), st.integers(0, 40), st.sampled_from(DTYPES))
@hypothesis.settings(max_examples=30, deadline=None)
def test_transposition(rows, columns, dtype):
    matrix = np.random.default_rng(0).normal(size=(rows, columns)).astype(dtype)
    found = transposed(matrix)
    assert found.flags["C_CONTIGUOUS"]
    assert found.dtype == matrix.dtype
    np.testing.assert_array_equal(found, matrix.T)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan, -np.nan, 0.0, -0.0, 6e4])
def test_what_is_not_finite_is_found(dtype, value):
    array = np.ones(2**19 + 3, dtype)
    assert is_finite(array)
    array[-2] = value
    assert is_finite(array) == np.isfinite(value)
    assert is_finite(np.zeros((0, 3), dtype))
