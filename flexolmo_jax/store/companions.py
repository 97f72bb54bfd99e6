"""Files that accompany a model, such as its tokenizer: a model has them, and what is made of it carries them along."""

import shutil
from pathlib import Path

from flexolmo_jax.errors import UserError
from flexolmo_jax.store.layout import regular_files

DIRECTORY = "huggingface"
"""Where they are, beside the arrays of a model."""

MAX_FILE_BYTES = 64 * 2**20
"""None is larger."""


def carry(files: Path, derived: Path) -> None:
    """Copies them, if there are any, into a model.

    Args:
      files: where they are: the directory of another model's, or of any that it shall have.
      derived: directory of the model.

    Raises:
      UserError: one is a link or larger than such a file is.
    """
    if not files.exists():
        return
    target = derived / DIRECTORY
    target.mkdir(exist_ok=True)
    for name, status in regular_files(files):
        if status.st_size > MAX_FILE_BYTES:
            raise UserError(f"{files / name} is larger than {MAX_FILE_BYTES:,} bytes: it is not what it should be")
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(files / name, target / name)
