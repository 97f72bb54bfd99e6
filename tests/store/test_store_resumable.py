"""Output directories that a second run goes on writing."""

import pytest

from flexolmo_jax.errors import UserError
from flexolmo_jax.store.resumable import JOURNAL, refuse_losing, resumable_directory


def interrupt(out, plan, parts):
    """Writes these parts and stops as a killed process would, but for the lock, which the kernel gives back."""
    with pytest.raises(KeyboardInterrupt), resumable_directory(out, plan) as found:
        for name, content in parts.items():
            (found.directory / name).write_text(content)
            found.finish(name, len(content))
        raise KeyboardInterrupt


def test_parts_of_an_interrupted_run_are_known_to_the_next(tmp_path):
    out = tmp_path / "out"
    interrupt(out, {"a": 1}, {"one": "1", "two": "22"})
    assert not out.exists()
    with resumable_directory(out, {"a": 1}) as parts:
        assert [parts.earlier(name) for name in ("one", "two", "three")] == [1, 2, None]
        assert (parts.directory / "two").read_text() == "22"
    assert sorted(file.name for file in out.iterdir()) == ["one", "two"]
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize("left", ["", "{", '{"plan": {"a": 1}', "\x00\x00\n{}", "[]\n[]"])
def test_a_torn_journal_begins_anew(left, tmp_path):
    out = tmp_path / "out"
    interrupt(out, {"a": 1}, {"one": "1"})
    (tmp_path / ".out.partial" / JOURNAL).write_text(left)
    with resumable_directory(out, {"a": 1}) as parts:
        assert parts.earlier("one") is None
        assert [file.name for file in parts.directory.iterdir()] == [JOURNAL]


def test_half_a_line_at_the_end_spoils_nothing(tmp_path):
    out = tmp_path / "out"
    interrupt(out, {"a": 1}, {"one": "1", "two": "22"})
    journal = tmp_path / ".out.partial" / JOURNAL
    whole = journal.read_text()
    for cut in range(1, len('\n{"two": 2}')):
        journal.write_text(whole[:-cut])
        with pytest.raises(KeyboardInterrupt), resumable_directory(out, {"a": 1}) as parts:
            assert (parts.earlier("one"), parts.earlier("two")) == (1, None)
            parts.finish("three", 3)
            raise KeyboardInterrupt
        with pytest.raises(KeyboardInterrupt), resumable_directory(out, {"a": 1}) as parts:
            assert (parts.earlier("one"), parts.earlier("three")) == (1, 3)
            raise KeyboardInterrupt


def test_another_plan_or_an_error_leaves_nothing_of_it(tmp_path):
    out = tmp_path / "out"
    interrupt(out, {"a": 1}, {"one": "1"})
    with resumable_directory(out, {"a": 2}) as parts:
        assert parts.earlier("one") is None
        assert not (parts.directory / "one").exists()
    with pytest.raises(UserError, match="exists already"), resumable_directory(out, {"a": 2}):
        pass
    other = tmp_path / "other"
    with pytest.raises(ValueError, match="no"), resumable_directory(other, {}) as parts:
        (parts.directory / "one").mkdir()
        raise ValueError("no")
    with pytest.raises(UserError, match=r"cannot write .*: No space left"), resumable_directory(other, {}):
        raise OSError(28, "No space left on device")
    assert list(tmp_path.iterdir()) == [out]


def test_one_process_at_a_time(tmp_path):
    with resumable_directory(tmp_path / "out", {}) as parts:
        (parts.directory / "one").write_text("1")
        with pytest.raises(UserError, match="another process"), resumable_directory(tmp_path / "out", {}):
            pass
        assert (parts.directory / "one").exists()


def test_what_is_read_is_not_replaced(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "a")
    for out in (tmp_path / "a" / "b", tmp_path / "a", tmp_path / "link"):
        with pytest.raises(UserError, match="is or holds"):
            refuse_losing(tmp_path / "a" / "b", out)
    refuse_losing(tmp_path / "a", tmp_path / "a" / "b")
    refuse_losing(tmp_path / "a", tmp_path / "c")
