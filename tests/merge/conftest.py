"""An honest contribution, copies of it to be spoilt, and what every refusal has in common."""

import os
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def honest(tmp_path_factory) -> Path:
    """A directory with an anchor, a contribution for it, and one for another anchor."""
    from tests.small import write_anchor, write_contribution

    root = tmp_path_factory.mktemp("honest")
    write_anchor(root / "anchor")
    write_contribution(root / "math", root / "anchor", "math")
    write_anchor(root / "other", seed=7)
    write_contribution(root / "foreign", root / "other", "math")
    return root


@pytest.fixture
def bad(honest, tmp_path) -> Path:
    """A copy of the honest contribution, to be spoilt."""
    return Path(shutil.copytree(honest / "math", tmp_path / "bad"))


@pytest.fixture
def refused(honest) -> Callable[[Path], str]:
    """Merges a contribution, expects a refusal that leaves nothing and takes little memory, returns its sentence."""
    from flexolmo_jax.errors import UserError
    from flexolmo_jax.merge import merge

    def merge_and_expect_a_refusal(directory: Path) -> str:
        before = sorted(os.listdir(directory.parent))
        tracemalloc.start()
        try:
            with pytest.raises(UserError) as refusal:
                merge(honest / "anchor", [directory], directory.parent / "merged")
            assert tracemalloc.get_traced_memory()[1] < 64 * 2**20
        finally:
            tracemalloc.stop()
        assert sorted(os.listdir(directory.parent)) == before
        sentence = str(refusal.value)
        assert sentence.isprintable()
        assert len(sentence) < 800
        return sentence

    return merge_and_expect_a_refusal
