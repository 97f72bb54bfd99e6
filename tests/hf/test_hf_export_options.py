"""What an export can be asked for: sizes, dtypes, tokenizers, cards, and going on after an interruption."""

import json
import re
import subprocess
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file
from tokenizers import Tokenizer, models, pre_tokenizers

from flexolmo_jax import cli
from flexolmo_jax.errors import UserError
from flexolmo_jax.flags import number_of_bytes
from flexolmo_jax.hf import export_hf, import_hf, read_hf, safetensors_file
from flexolmo_jax.merge import merge
from flexolmo_jax.store import arrays, checkpoint
from flexolmo_jax.store.manifest import ExpertRecord, read
from tests.hf.test_hf_export import assert_same_params
from tests.hf.test_hf_import_artefacts import assert_same_tensors, foreign, tensors_of


def test_digests_are_those_of_the_files(merged, tmp_path):
    export_hf(merged, tmp_path / "hf", max_shard_bytes=20_000)
    check = ["sha256sum", "--check", "--strict", "SHA256SUMS"]
    done = subprocess.run(check, cwd=tmp_path / "hf", capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    listed = {line.split()[1] for line in (tmp_path / "hf" / "SHA256SUMS").read_text().splitlines()}
    assert listed == {file.name for file in (tmp_path / "hf").iterdir()} - {"SHA256SUMS"}


def test_an_interrupted_export_goes_on_after_its_last_whole_shard(merged, tmp_path, monkeypatch):
    export_hf(merged, tmp_path / "whole", max_shard_bytes=20_000)
    written, write = [], safetensors_file.write

    def interrupted(file, *arguments):
        if len(written) == 4:
            written.append(None)
            raise KeyboardInterrupt
        written.append(file.name)
        return write(file, *arguments)

    monkeypatch.setattr(safetensors_file, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        export_hf(merged, tmp_path / "hf", max_shard_bytes=20_000)
    assert not (tmp_path / "hf").exists()
    partial = tmp_path / ".hf.partial"
    (partial / written[1]).write_bytes((partial / written[1]).read_bytes()[:-1])  # Lost by the disk, not by us.
    export_hf(merged, tmp_path / "hf", max_shard_bytes=20_000)
    again = [name for name in written[5:] if name in written[:4]]
    assert again == [written[1]]
    for file in (tmp_path / "whole").iterdir():
        assert (tmp_path / "hf" / file.name).read_bytes() == file.read_bytes(), file.name
    assert {path.name for path in tmp_path.iterdir()} == {"whole", "hf"}


def test_another_plan_begins_anew(merged, tmp_path, monkeypatch):
    write = safetensors_file.write
    monkeypatch.setattr(safetensors_file, "write", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        export_hf(merged, tmp_path / "hf", dtype="bfloat16")
    monkeypatch.setattr(safetensors_file, "write", write)
    export_hf(merged, tmp_path / "hf")
    assert_same_params(read_hf(tmp_path / "hf").params, checkpoint.load(merged)[1])


def test_two_processes_do_not_write_one_directory(merged, tmp_path, monkeypatch):
    write = safetensors_file.write

    def meanwhile(*arguments):
        with pytest.raises(UserError, match="another process is writing"):
            export_hf(merged, tmp_path / "hf")
        return write(*arguments)

    monkeypatch.setattr(safetensors_file, "write", meanwhile)
    export_hf(merged, tmp_path / "hf")
    assert (tmp_path / "hf" / "config.json").is_file()


@pytest.mark.parametrize("name", ["float32", "bfloat16"])
def test_dtype(name, merged, config, names, random_params, tmp_path):
    export = export_hf(merged, tmp_path / "hf", dtype=name)
    assert export.dtype == json.loads((tmp_path / "hf" / "config.json").read_text())["dtype"] == name
    for tensor in load_file(tmp_path / "hf" / "model.safetensors").values():
        assert tensor.dtype == jnp.dtype(name)
    params = random_params(config, names)
    np.testing.assert_array_equal(
        read_hf(tmp_path / "hf").params["experts"]["math"]["up"].astype(np.float32),
        params["experts"]["math"]["up"].astype(name).astype(np.float32),
    )
    with pytest.raises(UserError, match="dtype is 'int8', but must be one of float32, bfloat16"):
        export_hf(merged, tmp_path / "other", dtype="int8")


def test_a_model_is_never_replaced_by_its_own_export(merged, tmp_path):
    for out in (merged, merged.parent):
        with pytest.raises(UserError, match="which is to be read"):
            export_hf(merged, out, overwrite=True)
    assert read(merged).kind == "merged"


def test_sizes_on_the_command_line():
    found = [number_of_bytes(text) for text in ("500MB", "2GiB", "1.5KB", "77")]
    assert found == [500 * 10**6, 2**31, 1500, 77]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--max-shard-size", "big"], "'big' is not a number of bytes"),
        (["--max-shard-size", "0"], "at least one byte"),
        (["--drop-bias", "--custom-code"], "give one of --drop-bias, --custom-code"),
        (["--dtype", "half"], "dtype is 'half'"),
        (["--tokenizer", "/nowhere"], "no tokenizer"),
    ],
)
def test_refusals_of_the_command_line(flags, message, merged, tmp_path, capsys):
    assert cli.main(["export-hf", str(merged), "--out", str(tmp_path / "hf"), *flags]) == 2
    said = capsys.readouterr().err
    assert re.search(message, said)
    assert said.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_import_on_the_command_line(merged, tmp_path, capsys):
    assert cli.main(["export-hf", str(merged), "--out", str(tmp_path / "hf")]) == 0
    arguments = ["import-hf", str(tmp_path / "hf"), "--out", str(tmp_path / "ours"), "--names", "public,a,b", "--json"]
    capsys.readouterr()
    assert cli.main(arguments) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["contributions"]["a"] == str(tmp_path / "ours" / "contributions" / "a")
    assert report["experts"] == ["a", "b"]
    assert cli.main(arguments) == 2
    assert "exists already" in capsys.readouterr().err
    (tmp_path / "hf" / "config.json").write_text("{")
    assert cli.main(["import-hf", str(tmp_path / "hf"), "--out", str(tmp_path / "more")]) == 2
    assert not (tmp_path / "more").exists()


def test_the_card_names_experts_owners_and_licences(config, names, random_params, write_model, tmp_path):
    hostile = "Eve | <script>alert(1)</script>\n---\n[click](http://e.vil) `x`"
    records = (
        ExpertRecord(name="public", licence="ODC-BY-1.0"),
        ExpertRecord(name="math", owner="Ada", licence="CC-BY-4.0", tokens_seen=12_345, contribution="ab" * 32),
        ExpertRecord(name="code", owner=hostile, licence="x" * 10_000),
    )
    source = write_model(tmp_path / "merged", config, random_params(config, names), experts=records, names=names)
    export_hf(source, tmp_path / "hf")
    card = (tmp_path / "hf" / "README.md").read_text(encoding="utf-8")
    assert "| math | Ada | CC-BY-4.0 | 12,345 | none | abababababab |" in card
    assert "## How to opt out" in card
    assert "--experts public,math\n" in card
    assert "<script>" not in card
    assert "](http" not in card
    assert max(map(len, card.splitlines())) < 1000
    rows = [line for line in card.splitlines() if line.startswith("| ")]
    assert len(rows) == 1 + len(names)
    assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows} == {7}
    assert card.count("\n---\n") == 1
    export_hf(source, tmp_path / "one", experts=["public"])
    card = (tmp_path / "one" / "README.md").read_text(encoding="utf-8")
    assert "opt out" not in card
    assert "also has: math, code" in card


def test_a_tuned_router_is_told_of(config, names, random_params, write_model, tmp_path):
    source = write_model(
        tmp_path / "merged", config, random_params(config, names), names=names, router_tuned_on=("math",)
    )
    export_hf(source, tmp_path / "hf")
    assert "tuned on text chosen by math" in (tmp_path / "hf" / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def with_tokenizer(config, tmp_path_factory):
    """A directory with a word tokenizer of another program."""
    directory = tmp_path_factory.mktemp("foreign") / "hf"
    foreign(directory, config, 2, dtype=np.float32)
    vocabulary = {"<unk>": 0, "sail": 1, "reef": 2, "tide": 3}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    (directory / "generation_config.json").write_text('{"eos_token_id": [5, 7], "temperature": 0.5}')
    return directory


def test_a_foreign_tokenizer_comes_back(with_tokenizer, tmp_path):
    done = import_hf(with_tokenizer, tmp_path / "ours")
    assert read(done.anchor).tokenizer.startswith("tokenizer.json:")
    for home in (done.anchor, done.merged):
        export_hf(home, tmp_path / "back", overwrite=True)
        for file in ("tokenizer.json", "tokenizer_config.json"):
            assert (tmp_path / "back" / file).read_bytes() == (with_tokenizer / file).read_bytes()
        generation = json.loads((tmp_path / "back" / "generation_config.json").read_text())
        assert generation == {"eos_token_id": [5, 7], "temperature": 0.5}
        content = json.loads((tmp_path / "back" / "config.json").read_text())
        fields = ("eos_token_id", "pad_token_id", "bos_token_id", "max_position_embeddings")
        assert [content[field] for field in fields] == [5, 6, None, 128]


def test_a_model_that_does_not_carry_its_tokenizer_needs_it_named(with_tokenizer, merged, tmp_path):
    done = import_hf(with_tokenizer, tmp_path / "ours")
    manifest, params = checkpoint.load(done.merged)
    checkpoint.write(tmp_path / "bare", params, manifest)
    with pytest.raises(UserError, match=r"does not carry: name a directory .* --tokenizer"):
        export_hf(tmp_path / "bare", tmp_path / "back")
    export_hf(merged, tmp_path / "bytes")
    with pytest.raises(UserError, match="another one than"):
        export_hf(tmp_path / "bare", tmp_path / "back", tokenizer=tmp_path / "bytes")
    for named in (with_tokenizer, done.anchor):
        export_hf(tmp_path / "bare", tmp_path / "back", tokenizer=named, overwrite=True)
        assert (tmp_path / "back" / "tokenizer.json").read_bytes() == (with_tokenizer / "tokenizer.json").read_bytes()
    (done.anchor / "huggingface" / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="is not the tokenizer that"):
        export_hf(done.anchor, tmp_path / "again")


def test_what_is_merged_from_an_imported_anchor_carries_its_tokenizer(with_tokenizer, tmp_path):
    done = import_hf(with_tokenizer, tmp_path / "ours")
    parts = list(done.contributions.values())
    merge(done.anchor, parts, tmp_path / "merged")
    export_hf(tmp_path / "merged", tmp_path / "back")
    assert (tmp_path / "back" / "tokenizer.json").read_bytes() == (with_tokenizer / "tokenizer.json").read_bytes()
    (done.anchor / "huggingface" / "vocab.json").symlink_to("/etc/hostname")
    with pytest.raises(UserError, match="which is a link"):
        merge(done.anchor, parts, tmp_path / "again")
    assert not list(tmp_path.glob("*again*"))


def test_a_model_without_a_known_tokenizer_is_exported_without_one(config, tmp_path):
    foreign(tmp_path / "hf", config, 1, dtype=np.float32)
    done = import_hf(tmp_path / "hf", tmp_path / "ours")
    export_hf(done.anchor, tmp_path / "back")
    assert not (tmp_path / "back" / "tokenizer.json").exists()
    assert json.loads((tmp_path / "back" / "generation_config.json").read_text()) == {
        "eos_token_id": 5,
        "pad_token_id": 6,
    }


def test_a_bfloat16_row_takes_a_bias_up_in_float32(config, names, random_params, write_model, tmp_path):
    import dataclasses

    config = dataclasses.replace(config, bias_channel=True)
    params = random_params(config, names, bias=2.0)
    for name in names:
        params["router"][name]["row"] = params["router"][name]["row"].astype(jnp.bfloat16)
    source = write_model(tmp_path / "merged", config, params, names=names)
    export_hf(source, tmp_path / "hf")
    for layer in range(config.layers):
        gate = load_file(tmp_path / "hf" / "model.safetensors")[f"model.layers.{layer}.mlp.gate.weight"]
        assert gate.dtype == np.float32
        row = params["router"]["code"]["row"][layer].astype(np.float32)
        assert gate[2, 0] == row[0] + params["router"]["code"]["bias"][layer]
    assert arrays.fingerprint(read(source).arrays)


def test_an_overwrite_that_is_cut_short_never_mixes_two_models(config, tmp_path, monkeypatch):
    """Between the two renames there is no output at all, and the next run completes."""
    foreign(tmp_path / "old", config, 1, dtype=np.float32, seed=1)
    new = foreign(tmp_path / "new", config, 1, dtype=np.float32, seed=2)
    old = import_hf(tmp_path / "old", tmp_path / "a").anchor
    source = import_hf(tmp_path / "new", tmp_path / "b").anchor
    export_hf(old, tmp_path / "hf")
    rename, calls = Path.rename, []

    def cut(path, target):
        calls.append(path.name)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", cut)
    with pytest.raises(KeyboardInterrupt):
        export_hf(source, tmp_path / "hf", overwrite=True)
    assert calls == ["hf", ".hf.partial"]
    assert not (tmp_path / "hf").exists()
    monkeypatch.setattr(Path, "rename", rename)
    export_hf(source, tmp_path / "hf")
    assert_same_tensors(tensors_of(tmp_path / "hf"), new)
    assert {path.name for path in tmp_path.iterdir()} == {"old", "new", "a", "b", "hf"}
