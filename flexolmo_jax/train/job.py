"""The directory of a job: whose it is, and whether it is done."""

import dataclasses
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flexolmo_jax.data.tokens import fingerprint
from flexolmo_jax.errors import UserError

_SETTINGS = "job.json"
_PREPARED = "prepared"
_TEXTS = "texts"


class Job:
    """One job in one directory, identified by its settings and by the texts that it reads.

    A directory that holds another job is refused, because going on from its checkpoints would silently mix the two.
    Until `begin` nothing of an older job is touched, and what a job that never began has left there vanishes:

        with Job(out, settings, overwrite=False) as job:
            …  # check and prepare what the job needs
            job.begin({"own": prepared})
            …  # train
    """

    def __init__(self, out: Path, settings: dict[str, Any], *, overwrite: bool):
        """Looks at the directory, and creates it if need be.

        Raises:
          UserError: it holds something else and `overwrite` is not given, or it cannot be written to.
        """
        self.out = out
        self._settings = json.loads(json.dumps(settings, default=_plain))
        self._overwrite = overwrite
        self._created = not out.exists()
        self._empty = self._created or not any(out.iterdir())
        self._begun = False
        if not self._empty:
            self._refuse_what_is_no_job()
            if not overwrite and (out / _SETTINGS).exists():
                self._refuse_other()
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot write {out}: {error.strerror or error}") from error

    def __enter__(self) -> "Job":
        return self

    def __exit__(self, kind, *_) -> None:
        if kind and not self._begun and self._empty:
            _clear(self.out)
            if self._created:
                self.out.rmdir()

    @property
    def prepared(self) -> Path:
        """Where the job's text goes, as tokens."""
        return self.out / _PREPARED

    def is_done(self, result: str) -> bool:
        """Whether the job's result is there; it appears complete or not at all."""
        return not self._overwrite and (self.out / result).exists()

    def begin(self, texts: Mapping[str, Path]) -> None:
        """Removes the job that is to be overwritten, if any, and claims the directory.

        Args:
          texts: the prepared texts that it reads, by what they are to it.

        Raises:
          UserError: the job that was begun here reads a text that has changed since.
        """
        fingerprints = {name: fingerprint(prepared) for name, prepared in sorted(texts.items())}
        if self._overwrite:
            _clear(self.out, keep=_PREPARED)
        elif (self.out / _SETTINGS).exists():
            self._refuse_other_texts(fingerprints)
        content = self._settings | {_TEXTS: fingerprints}
        (self.out / _SETTINGS).write_text(json.dumps(content, indent=1, sort_keys=True))
        self._begun = True

    def _refuse_what_is_no_job(self) -> None:
        others = [entry for entry in self.out.iterdir() if not entry.name.startswith(_PREPARED)]
        if others and not (self.out / _SETTINGS).exists():
            raise UserError(f"{self.out} exists already and is not a job of ours: give another --out")

    def _refuse_other(self) -> None:
        found = json.loads((self.out / _SETTINGS).read_text())
        found.pop(_TEXTS, None)
        for key in sorted(self._settings.keys() | found.keys()):
            was, now = found.get(key), self._settings.get(key)
            if was == now:
                continue
            if isinstance(was, dict) and isinstance(now, dict):
                inner = next(name for name in sorted(was.keys() | now.keys()) if was.get(name) != now.get(name))
                key, was, now = f"{key}.{inner}", was.get(inner), now.get(inner)
            raise UserError(
                f"{self.out} holds another job ({key} was {was!r} and is now {now!r}): "
                "give another --out, or --overwrite"
            )

    def _refuse_other_texts(self, fingerprints: dict[str, str]) -> None:
        found = json.loads((self.out / _SETTINGS).read_text()).get(_TEXTS, fingerprints)
        if changed := [name for name in fingerprints if found.get(name) != fingerprints[name]]:
            raise UserError(
                f"{self.out} holds a job whose {changed[0]} text has changed since it began: "
                "give another --out, or --overwrite"
            )


def _clear(directory: Path, keep: str = "") -> None:
    for entry in directory.iterdir():
        if entry.is_dir() and entry.name != keep:
            shutil.rmtree(entry)
        elif not entry.is_dir():
            entry.unlink()


def _plain(value: Any) -> Any:
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) and not isinstance(value, type) else str(value)
