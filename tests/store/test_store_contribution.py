"""Contributions: verified by streaming, signed, compressed, and merged whatever their rank."""

import json
import shutil
import subprocess

import jax
import ml_dtypes
import numpy as np
import pytest

from flexolmo_jax import cli
from flexolmo_jax.errors import UserError
from flexolmo_jax.infer import load, load_with_contribution
from flexolmo_jax.merge import merge, revise, soup
from flexolmo_jax.model.partition import flatten
from flexolmo_jax.store import checkpoint, contribution, signing
from flexolmo_jax.store.compression import compress
from flexolmo_jax.store.low_rank import rank_for_energy, truncate
from flexolmo_jax.store.manifest import ExpertRecord, read
from tests.small import CONFIG, write_anchor, write_contribution, write_corpus

RANK = 3


def low_rank_difference(anchor, rank=RANK, seed=4):
    """Changes an expert's matrices to the public expert's plus a difference of this rank."""
    public = checkpoint.load(anchor)[1]["experts"]["public"]
    rng = np.random.default_rng(seed)

    def change(params):
        for matrix, leaf in params["experts"]["math"].items():
            layers, rows, columns = leaf.shape
            left, right = rng.normal(size=(layers, rows, rank)), rng.normal(size=(layers, rank, columns))
            leaf[...] = public[matrix] + 0.1 * left @ right

    return change


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    root = tmp_path_factory.mktemp("parts")
    write_anchor(root / "anchor")
    write_contribution(root / "math", root / "anchor", "math", change=low_rank_difference(root / "anchor"))
    write_contribution(root / "code", root / "anchor", "code", 2)
    for name in ("owner", "stranger"):
        signing.create_keys(root / name)
    return root


@pytest.fixture
def signed(parts, tmp_path):
    shutil.copytree(parts / "math", tmp_path / "math")
    signing.sign(tmp_path / "math", parts / "owner")
    return tmp_path / "math"


def flexolmo(capsys, *arguments):
    """Exit code and report of a command line."""
    code = cli.main([*map(str, arguments), "--json"])
    printed = capsys.readouterr()
    return code, json.loads(printed.out) if printed.out else printed.err


def test_verify_says_what_it_verified(parts, capsys):
    code, report = flexolmo(capsys, "contribution", "verify", parts / "math", "--anchor", parts / "anchor")
    assert code == 0 and report["expert"] == "math" and report["arrays"] == 5
    assert report["bytes"] == 4 * (CONFIG.num_params(2) - CONFIG.num_params(1))


def test_verify_refuses_what_a_merge_refuses(parts, tmp_path, capsys):
    shutil.copytree(parts / "math", tmp_path / "bad")
    (tmp_path / "bad/notes.txt").write_text("private")
    code, error = flexolmo(capsys, "contribution", "verify", tmp_path / "bad", "--anchor", parts / "anchor")
    assert code == 2 and error.count("\n") == 1 and "notes.txt" in error


def test_a_signature_by_the_owner_is_accepted_and_recorded(parts, signed, tmp_path):
    manifest = merge(parts / "anchor", [signed], tmp_path / "merged", signed_by={"math": parts / "owner.pub"})
    key = signing.read_public(parts / "owner.pub")
    assert manifest.experts[1].signed_by == signing.fingerprint(key) == read(tmp_path / "merged").experts[1].signed_by


def test_openssl_agrees_about_a_signature(parts, signed, tmp_path):
    if shutil.which("openssl") is None:
        pytest.skip("there is no openssl")
    import base64

    content = json.loads((signed / "signature.json").read_text())
    (tmp_path / "signature").write_bytes(base64.b64decode(content["signature"]))
    message = b"flexolmo contribution manifest\n" + (signed / "manifest.json").read_bytes()
    (tmp_path / "message").write_bytes(message)
    command = ["openssl", "pkeyutl", "-verify", "-pubin", "-inkey", parts / "owner.pub", "-rawin"]
    done = subprocess.run(
        [*map(str, command), "-in", str(tmp_path / "message"), "-sigfile", str(tmp_path / "signature")], check=False
    )
    assert done.returncode == 0


def unsigned(directory):
    (directory / "signature.json").unlink()


def changed_manifest(directory):
    file = directory / "manifest.json"
    file.write_text(file.read_text().replace("CC0-1.0", "CC-BY-4.0"))


def mangled_signature(directory):
    content = json.loads((directory / "signature.json").read_text())
    content["signature"] = "A" + content["signature"][1:] if content["signature"][0] != "A" else "B"
    (directory / "signature.json").write_text(json.dumps(content))


def no_signature_at_all(directory):
    (directory / "signature.json").write_text("[]")


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        (unsigned, "is not signed"),
        (changed_manifest, "not one by"),
        (mangled_signature, "not one by|no signature"),
        (no_signature_at_all, "no signature that"),
    ],
)
def test_what_is_not_signed_by_the_owner_as_it_is_now_is_refused(spoil, complaint, parts, signed, tmp_path):
    spoil(signed)
    with pytest.raises(UserError, match=complaint):
        merge(parts / "anchor", [signed], tmp_path / "merged", signed_by={"math": parts / "owner.pub"})
    assert not (tmp_path / "merged").exists()


def test_another_ones_signature_and_a_missing_key_are_refused(parts, signed, tmp_path):
    with pytest.raises(UserError, match=r"not one by .*stranger"):
        merge(parts / "anchor", [signed], tmp_path / "merged", signed_by={"math": parts / "stranger.pub"})
    with pytest.raises(UserError, match="no key in --signed-by"):
        merge(parts / "anchor", [signed, parts / "code"], tmp_path / "merged", signed_by={"math": parts / "owner.pub"})


def test_keys_are_not_overwritten_and_other_files_are_no_keys(parts, tmp_path):
    with pytest.raises(UserError, match="cannot write"):
        signing.create_keys(parts / "owner")
    assert (parts / "owner").stat().st_mode & 0o077 == 0
    (tmp_path / "key").write_text("secret")
    with pytest.raises(UserError, match="no private key"):
        signing.sign(parts / "math", tmp_path / "key")
    with pytest.raises(UserError, match="no public key"):
        signing.read_public(tmp_path / "key")


def test_at_the_true_rank_nothing_is_lost(parts, tmp_path):
    report = compress(parts / "math", parts / "anchor", tmp_path / "small", rank=RANK)
    assert report.energy_kept == pytest.approx(1, abs=1e-6) and report.bytes_after < report.bytes_before
    assert read(tmp_path / "small").experts[0].rank == RANK
    ids = np.arange(12, dtype=np.int32)[None] + 5
    full, small = (load_with_contribution(parts / "anchor", each) for each in (parts / "math", tmp_path / "small"))
    np.testing.assert_allclose(full(ids), small(ids), atol=2e-4)


def test_full_and_low_rank_merge_together_into_what_the_factors_multiply_to(parts, tmp_path):
    compress(parts / "math", parts / "anchor", tmp_path / "small", rank=2)
    manifest = merge(parts / "anchor", [tmp_path / "small", parts / "code"], tmp_path / "merged")
    assert manifest.names == ("public", "math", "code") and manifest.experts[1].rank == 2
    _, factors = contribution.load(tmp_path / "small", read(parts / "anchor"))
    public = checkpoint.load(parts / "anchor")[1]["experts"]["public"]
    merged = flatten(checkpoint.load(tmp_path / "merged")[1])
    for matrix in ("gate", "up", "down"):
        left, right = (factors["experts"]["math"][f"{matrix}_{side}"].astype(np.float64) for side in ("left", "right"))
        expected = (public[matrix] + np.einsum("ldr,lrf->ldf", left, right)).astype(np.float32)
        np.testing.assert_allclose(merged["experts", "math", matrix], expected, rtol=1e-6, atol=1e-7)
    ids = np.arange(12, dtype=np.int32)[None] + 5
    own = load_with_contribution(parts / "anchor", tmp_path / "small")
    np.testing.assert_allclose(load(tmp_path / "merged")(ids, experts=["public", "math"], top_k=2), own(ids), atol=1e-4)
    merge(parts / "anchor", [parts / "code"], tmp_path / "code")
    revise(tmp_path / "code", tmp_path / "both", add=[tmp_path / "small"])
    both = flatten(checkpoint.load(tmp_path / "both")[1])
    assert all(np.array_equal(leaf, merged[path]) for path, leaf in both.items())


def test_what_is_in_bfloat16_stays_so(parts, tmp_path):
    def rounded(leaf):
        return np.asarray(leaf).astype(ml_dtypes.bfloat16)

    expert = jax.tree.map(rounded, checkpoint.load(parts / "math")[1])
    record = ExpertRecord(name="math")
    contribution.write(tmp_path / "math", expert, read(parts / "anchor"), record, top_k=2, gin="")
    report = compress(tmp_path / "math", parts / "anchor", tmp_path / "small", rank=RANK)
    assert {leaf["dtype"] for leaf in read(tmp_path / "small").arrays.values()} == {"bfloat16"}
    assert report.bytes_after < report.bytes_before
    merge(parts / "anchor", [tmp_path / "small"], tmp_path / "merged")
    merged = checkpoint.load(tmp_path / "merged")[1]["experts"]
    for matrix, own in expert["experts"]["math"].items():
        found = merged["math"][matrix]
        assert found.dtype == own.dtype
        difference = own.astype(np.float32) - merged["public"][matrix]
        lost = found.astype(np.float32) - own.astype(np.float32)
        assert np.linalg.norm(lost) < 0.02 * np.linalg.norm(difference)


def test_a_damaged_factor_ends_the_merge(parts, tmp_path):
    compress(parts / "math", parts / "anchor", tmp_path / "small", rank=2)
    chunk = tmp_path / "small/arrays/state/experts.math.up_right/c/0/0/0"
    chunk.write_bytes(bytes(chunk.stat().st_size))
    with pytest.raises(UserError, match="digest of experts/math/up_right"):
        merge(parts / "anchor", [tmp_path / "small"], tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_energy_chooses_the_smallest_rank_that_keeps_it(parts, tmp_path):
    report = compress(parts / "code", parts / "anchor", tmp_path / "small", energy=0.8)
    assert report.energy_kept >= 0.8
    below = compress(parts / "code", parts / "anchor", tmp_path / "smaller", rank=report.rank - 1)
    assert below.energy_kept < 0.8
    assert rank_for_energy(np.array([[3.0, 1.0, 0.0]]), 0.9) == 1
    assert rank_for_energy(np.array([[3.0, 1.0, 0.0], [1.0, 1.0, 1.0]]), 0.9) == 3
    with pytest.raises(UserError, match=r"--energy is 1\.5"):
        compress(parts / "code", parts / "anchor", tmp_path / "none", energy=1.5)


def test_a_truncation_is_the_nearest_matrix_of_its_rank():
    matrix = np.random.default_rng(0).normal(size=(7, 5))
    found = truncate(matrix, 2)
    values = np.linalg.svd(matrix, compute_uv=False)
    error = np.linalg.norm(matrix - found.left @ found.right)
    assert error == pytest.approx(np.sqrt(np.sum(values[2:] ** 2)), rel=1e-5)
    assert found.energy == pytest.approx(1 - error**2 / np.sum(values**2), rel=1e-5)


@pytest.mark.parametrize("rank", [0, 17])
def test_a_rank_that_cannot_be_is_refused(rank, parts, tmp_path):
    with pytest.raises(UserError, match="has rank 16 at most"):
        compress(parts / "math", parts / "anchor", tmp_path / "small", rank=rank)
    assert not (tmp_path / "small").exists()


def test_compressing_twice_is_refused_and_so_is_a_soup_of_low_rank(parts, tmp_path):
    compress(parts / "math", parts / "anchor", tmp_path / "small", rank=2)
    with pytest.raises(UserError, match="has rank 2 already"):
        compress(tmp_path / "small", parts / "anchor", tmp_path / "smaller", rank=1)
    with pytest.raises(UserError, match="of low rank"):
        soup(parts / "anchor", [tmp_path / "small"], tmp_path / "soup")


@pytest.mark.slow
def test_compress_measures_what_it_costs(parts, tmp_path, capsys):
    write_corpus(tmp_path / "text", [f"{n} and {n} make {2 * n}, which is even." for n in range(40)])
    arguments = ["--anchor", parts / "anchor", "--rank", 1, "--text", tmp_path / "text", "--out", tmp_path / "small"]
    code, report = flexolmo(capsys, "contribution", "compress", parts / "math", *arguments)
    assert code == 0 and report["rank"] == 1
    lost = report["bits_per_byte_after"] - report["bits_per_byte_before"]
    assert lost != 0 and report["bits_per_byte_lost"] == pytest.approx(lost)
