"""Preparation beyond one machine: pieces of work as an Apache Beam pipeline, on whichever runner the user names.

The workers meet in the file system: sources, the tokenizer and the directory to write must have the same paths on all
of them. What comes out is what one machine makes of the same text, byte for byte.
"""

import functools
import shutil
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from flexolmo_jax.data.workers import Workers
from flexolmo_jax.errors import UserError


def on_beam(arguments: Sequence[str], refusals: Path) -> Workers:
    """Does the jobs as a pipeline.

    Args:
      arguments: of the pipeline, as Beam takes them: `--runner=FlinkRunner` and what that runner needs.
      refusals: where a worker leaves what the user must change; made and removed again.

    Raises:
      UserError: Beam is not installed.
    """
    try:
        import apache_beam
        from apache_beam.options.pipeline_options import PipelineOptions
    except ImportError as error:
        raise UserError("Apache Beam is not installed: pip install 'flexolmo_jax[beam]'") from error

    def work(function: Callable[[Any], Any], jobs: Sequence[Any], advance: Callable[[int], None]) -> None:
        if not jobs:
            return
        refusals.mkdir(parents=True, exist_ok=True)
        try:
            with apache_beam.Pipeline(options=PipelineOptions(list(arguments))) as pipeline:
                spread = pipeline | apache_beam.Create(list(jobs)) | apache_beam.Reshuffle()
                _ = spread | apache_beam.Map(functools.partial(_attempt, function, refusals))
            for refusal in sorted(refusals.iterdir()):
                raise UserError(refusal.read_text(encoding="utf-8"))
        finally:
            shutil.rmtree(refusals, ignore_errors=True)
        advance(len(jobs))

    return work


def _attempt(function: Callable[[Any], Any], refusals: Path, job: Any) -> None:
    """Does a job; what the user must mend is left in a file, because Beam would bury it in its own traceback."""
    try:
        function(job)
    except UserError as error:
        (refusals / uuid.uuid4().hex).write_text(str(error), encoding="utf-8")
