"""The directory of a job: whose it is, and whether it is done."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

from flexolmo_jax.errors import UserError


class Job:
    """One job in one directory, identified by its settings.

    A directory that holds another job is refused, because going on from its checkpoints would silently mix the two.
    """

    def __init__(self, out: Path, settings: dict[str, Any], *, overwrite: bool):
        """Opens or creates the directory.

        Raises:
          UserError: it holds something else and `overwrite` is not given, or it cannot be written to.
        """
        self.out = out
        self.settings = json.loads(json.dumps(settings, default=_plain))
        file = out / "job.json"
        try:
            if overwrite:
                shutil.rmtree(out, ignore_errors=True)
            if out.exists() and not file.exists() and any(out.iterdir()):
                raise UserError(f"{out} exists already and is not a job of ours: give another --out, or --overwrite")
            out.mkdir(parents=True, exist_ok=True)
            if not file.exists():
                file.write_text(json.dumps(self.settings, indent=1, sort_keys=True))
        except OSError as error:
            raise UserError(f"cannot write {out}: {error.strerror or error}") from error
        self._refuse_other(json.loads(file.read_text()))

    def is_done(self, result: str) -> bool:
        """Whether the directory already holds the job's result, which appears there complete or not at all."""
        return (self.out / result).exists()

    def _refuse_other(self, found: dict[str, Any]) -> None:
        for key in sorted(self.settings.keys() | found.keys()):
            was, now = found.get(key), self.settings.get(key)
            if was == now:
                continue
            if isinstance(was, dict) and isinstance(now, dict):
                inner = next(name for name in sorted(was.keys() | now.keys()) if was.get(name) != now.get(name))
                key, was, now = f"{key}.{inner}", was.get(inner), now.get(inner)
            raise UserError(
                f"{self.out} holds another job ({key} was {was!r} and is now {now!r}): "
                "give another --out, or --overwrite"
            )


def _plain(value: Any) -> Any:
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) and not isinstance(value, type) else str(value)
