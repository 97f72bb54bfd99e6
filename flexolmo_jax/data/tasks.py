"""SeqIO's registry of tasks and mixtures, and ours in it. Importing this module imports TensorFlow.

`register` puts an owner's `TextTask` there; whatever trains with SeqIO can then read it. The built-in corpora are there
from the start, as `flexolmo_public`, `flexolmo_code`, `flexolmo_math` and `flexolmo_unicode`, and in equal parts as the
mixture `flexolmo_demo`; they are made, in the user's cache directory, when one is first read.
"""

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import seqio
import tensorflow as tf

from flexolmo_jax.data import builtin
from flexolmo_jax.data.documents import Bad
from flexolmo_jax.data.files import TOKENS
from flexolmo_jax.data.splits import SPLITS, digest_of, split_of_digest
from flexolmo_jax.data.text_task import TextTask
from flexolmo_jax.data.vocabularies import BYTES, Vocabulary, open_vocabulary
from flexolmo_jax.errors import UserError


class HuggingFaceVocabulary(seqio.Vocabulary):
    """A `tokenizer.json` as SeqIO wants it; `encode_tf` calls back into Python."""

    def __init__(self, file: str, eos_token: str = ""):
        super().__init__(extra_ids=0)
        self.tokens: Vocabulary = open_vocabulary(file, eos_token)

    @property
    def bos_id(self) -> int | None:
        return None

    @property
    def eos_id(self) -> int:
        return self.tokens.eos_id

    @property
    def unk_id(self) -> int | None:
        return None

    @property
    def pad_id(self) -> int:
        return self.tokens.pad_id

    @property
    def _base_vocab_size(self) -> int:
        return self.tokens.size

    def _encode(self, s: str) -> Sequence[int]:
        return self.tokens.encode([s])[0].tolist()

    def _decode(self, ids: Sequence[int]) -> str:
        return self.tokens.decode(ids)

    def _encode_tf(self, s: tf.Tensor) -> tf.Tensor:
        ids = tf.numpy_function(lambda text: self.tokens.encode([text.decode()])[0].astype(np.int32), [s], tf.int32)
        ids.set_shape([None])
        return ids

    def _decode_tf(self, ids: tf.Tensor) -> tf.Tensor:
        return tf.numpy_function(lambda values: self.tokens.decode(values.tolist()).encode(), [ids], tf.string)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, HuggingFaceVocabulary) and other.tokens.fingerprint == self.tokens.fingerprint


def register(task: TextTask) -> seqio.Task:
    """Puts a task into `seqio.TaskRegistry`; one that is there under its name is replaced."""
    return _register(task.name, lambda: task, seqio_vocabulary(task))


def seqio_vocabulary(task: TextTask) -> seqio.Vocabulary:
    """SeqIO's counterpart of a task's vocabulary."""
    if task.tokenizer == BYTES:
        return seqio.ByteVocabulary()
    if task.tokenizer.endswith(".model"):
        return seqio.SentencePieceVocabulary(task.tokenizer)
    return HuggingFaceVocabulary(task.tokenizer, task.eos_token)


def vocabulary_of(vocabulary: seqio.Vocabulary, task: str) -> Vocabulary:
    """Our counterpart of a vocabulary of SeqIO's.

    Raises:
      UserError: it is of a kind that we cannot tell the ids of.
    """
    if isinstance(vocabulary, HuggingFaceVocabulary):
        return vocabulary.tokens
    if vocabulary.extra_ids:
        raise UserError(f"the task {task} has a vocabulary with {vocabulary.extra_ids} extra ids: give it none")
    if isinstance(vocabulary, seqio.ByteVocabulary):
        return open_vocabulary(BYTES)
    if isinstance(vocabulary, seqio.SentencePieceVocabulary):
        return open_vocabulary(vocabulary.sentencepiece_model_file)
    kinds = "ByteVocabulary, SentencePieceVocabulary or HuggingFaceVocabulary of flexolmo_jax.data.tasks"
    raise UserError(f"the task {task} has a {type(vocabulary).__name__}, but must have a {kinds}")


def contents(task: TextTask, split: str) -> Iterator[str | np.ndarray]:
    """The documents of a split, in the order of the task's files.

    Raises:
      UserError: a file cannot be read, or it has a bad line and the task skips none.
    """
    for unit in task.units():
        if unit.split not in ("", split):
            continue
        for record in unit.records():
            if isinstance(record, Bad):
                continue
            if unit.split or split_of_digest(digest_of(record.content)) == split:
                yield record.content


def _register(name: str, task: Callable[[], TextTask], vocabulary: seqio.Vocabulary) -> seqio.Task:
    def dataset(split: str, shuffle_files: bool, seed: int | None = None) -> tf.data.Dataset:
        described = task()
        has_ids = all(unit.file.path.endswith(TOKENS) for unit in described.units())
        signature = tf.TensorSpec((None,), tf.int32) if has_ids else tf.TensorSpec((), tf.string)
        return tf.data.Dataset.from_generator(
            lambda: ({"targets": content} for content in contents(described, split)),
            output_signature={"targets": signature},
        )

    if name in seqio.TaskRegistry.names():
        seqio.TaskRegistry.remove(name)
    return seqio.TaskRegistry.add(
        name,
        source=seqio.FunctionDataSource(dataset_fn=dataset, splits=SPLITS),
        preprocessors=[_tokenize_text, seqio.preprocessors.append_eos],
        output_features={"targets": seqio.Feature(vocabulary, add_eos=True, dtype=tf.int32)},
    )


def _tokenize_text(dataset: tf.data.Dataset, output_features: dict[str, Any]) -> tf.data.Dataset:
    """SeqIO's `tokenize`, but for documents that are token ids already."""
    if dataset.element_spec["targets"].dtype != tf.string:
        return dataset
    return seqio.preprocessors.tokenize(dataset, output_features, copy_pretokenized=False)


def _builtin(name: str) -> TextTask:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    corpora = cache / "flexolmo_jax" / f"corpora-python{sys.version_info.major}.{sys.version_info.minor}"
    if not corpora.exists():
        partial = corpora.with_name(f".{os.getpid()}.{corpora.name}")
        builtin.build(partial)
        partial.rename(corpora)
    return TextTask(name=f"flexolmo_{name}", files=str(corpora / name))


for _name in builtin.MAX_BYTES:
    _register(f"flexolmo_{_name}", lambda name=_name: _builtin(name), seqio.ByteVocabulary())  # type: ignore[misc]
if "flexolmo_demo" not in seqio.MixtureRegistry.names():
    seqio.MixtureRegistry.add("flexolmo_demo", [f"flexolmo_{_name}" for _name in builtin.MAX_BYTES], default_rate=1.0)
