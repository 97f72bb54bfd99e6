"""Tasks and mixtures that somebody registered with SeqIO, as something to prepare."""

import contextlib
import dataclasses
import importlib
import os
import sys
from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np

from flexolmo_jax.data.documents import Document, Record
from flexolmo_jax.data.files import SourceFile
from flexolmo_jax.data.splits import SPLITS
from flexolmo_jax.data.vocabularies import Vocabulary
from flexolmo_jax.errors import UserError, did_you_mean

_FEATURE = "targets"
_MOST_SHARDS = 64


@dataclasses.dataclass(frozen=True)
class RegisteredTask:
    """A task of `seqio.TaskRegistry`, with whatever source and preprocessors it has.

    Its documents are the feature `targets`. If it has the splits `train`, `validation` and `test` these are taken;
    otherwise a stable hash of each document's ids decides.

    Attributes:
      module: importing it registers the task.
      name: of the task.
    """

    module: str
    name: str

    bad_share: ClassVar[float] = 0.0

    @property
    def where(self) -> str:
        return f"{self.module}:{self.name}"

    @property
    def vocabulary(self) -> Vocabulary:
        from flexolmo_jax.data.tasks import vocabulary_of

        features = self._task().output_features
        if _FEATURE not in features:
            raise UserError(f"the task {self.name} has no feature {_FEATURE!r}; {did_you_mean(_FEATURE, features)}")
        return vocabulary_of(features[_FEATURE].vocabulary, self.name)

    def units(self) -> "list[RegisteredUnit]":
        source = self._task().source
        named = set(SPLITS) <= set(source.splits)
        found = []
        for split in SPLITS if named else sorted(source.splits):
            count = min(_MOST_SHARDS, len(source.list_shards(split)))
            found += [RegisteredUnit(self, split, number, count, named) for number in range(count)]
        return found

    def _task(self) -> Any:
        return load(self.module, self.name)


@dataclasses.dataclass(frozen=True)
class RegisteredUnit:
    """A shard of the source of a registered task."""

    task: RegisteredTask
    source_split: str
    number: int
    count: int
    named: bool

    @property
    def vocabulary(self) -> Vocabulary:
        return self.task.vocabulary

    @property
    def split(self) -> str:
        return self.source_split if self.named else ""

    def records(self) -> Iterator[Record]:
        import seqio

        end = self.vocabulary.eos_id
        shard = seqio.ShardInfo(self.number, self.count) if self.count > 1 else None
        dataset = load(self.task.module, self.task.name).get_dataset(
            None, split=self.source_split, shuffle=False, shard_info=shard
        )
        for example in dataset.as_numpy_iterator():
            ids = np.asarray(example[_FEATURE])
            yield Document(ids[:-1] if len(ids) and ids[-1] == end else ids)

    def source(self) -> SourceFile | None:
        return None


def load(module: str, name: str) -> Any:
    """The task or mixture of this name, once a module has registered it.

    Raises:
      UserError: there is no such module, or it registers no such task.
    """
    with _quiet_start_of_tensorflow():
        import seqio

        import flexolmo_jax.data.tasks  # noqa: F401  registers the built-in ones
    sys.path.insert(0, os.getcwd())
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise UserError(f"there is no module {module!r} ({error})") from error
    finally:
        sys.path.remove(os.getcwd())
    known = {*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()}
    if name not in known:
        raise UserError(f"importing {module} registers no task or mixture {name!r}; {did_you_mean(name, known)}")
    return seqio.get_mixture_or_task(name)


def rates(module: str, name: str) -> dict[str, float] | None:
    """The rate of every task of a mixture; None if the name is a task's."""
    found = load(module, name)
    import seqio

    return {task.name: found.get_rate(task) for task in found.tasks} if isinstance(found, seqio.Mixture) else None


@contextlib.contextmanager
def _quiet_start_of_tensorflow() -> Iterator[None]:
    """TensorFlow greets on standard error whatever its log level says; a person who prepares text need not see that."""
    sys.stderr.flush()
    saved, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(nowhere)
