"""SeqIO tasks for text corpora. Importing this module imports TensorFlow, so only preparation does."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import seqio
import tensorflow as tf

from flexolmo_jax.data.documents import read_documents

EOS_ID = 1
"""In SeqIO's byte vocabulary: 0 pads, 1 ends a text, 2 is unknown, and byte `b` is `b + 3`."""


def text_task(name: str, files: Mapping[str, Sequence[Path]]) -> seqio.Task:
    """The registered task that reads these files per split as bytes, each document ended by EOS.

    Args:
      name: name in `seqio.TaskRegistry`; a task already there under this name is replaced.
      files: text files of each split.
    """
    source = seqio.FunctionDataSource(
        dataset_fn=lambda split, shuffle_files, seed=None: tf.data.Dataset.from_generator(
            lambda: ({"targets": text} for text in read_documents(files[split])),
            output_signature={"targets": tf.TensorSpec((), tf.string)},
        ),
        splits=tuple(files),
    )
    if name in seqio.TaskRegistry.names():
        seqio.TaskRegistry.remove(name)
    vocabulary = seqio.ByteVocabulary()
    return seqio.TaskRegistry.add(
        name,
        source=source,
        preprocessors=[seqio.preprocessors.tokenize, seqio.preprocessors.append_eos],
        output_features={"targets": seqio.Feature(vocabulary, add_eos=True, dtype=tf.int32)},
    )
