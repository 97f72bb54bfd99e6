"""SeqIO tasks for text corpora. Importing this module imports TensorFlow, so only preparation does."""

from pathlib import Path

import seqio
import tensorflow as tf

from flexolmo_jax.data.documents import split_texts
from flexolmo_jax.data.splits import SPLITS


def text_task(name: str, corpus: Path) -> seqio.Task:
    """The registered task that reads a corpus as bytes, each document ended by EOS.

    Args:
      name: name in `seqio.TaskRegistry`; a task already there under this name is replaced.
      corpus: directory or file; see `split_texts` for its splits.
    """
    source = seqio.FunctionDataSource(
        dataset_fn=lambda split, shuffle_files, seed=None: tf.data.Dataset.from_generator(
            lambda: ({"targets": text} for text in split_texts(corpus, split)),
            output_signature={"targets": tf.TensorSpec((), tf.string)},
        ),
        splits=SPLITS,
    )
    if name in seqio.TaskRegistry.names():
        seqio.TaskRegistry.remove(name)
    return seqio.TaskRegistry.add(
        name,
        source=source,
        preprocessors=[seqio.preprocessors.tokenize, seqio.preprocessors.append_eos],
        output_features={"targets": seqio.Feature(seqio.ByteVocabulary(), add_eos=True, dtype=tf.int32)},
    )
