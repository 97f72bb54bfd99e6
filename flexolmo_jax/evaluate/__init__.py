"""What a model is worth: bits per byte, exact match and routing by domain; tables, a report and pictures.

flexolmo_jax.evaluate.bits_per_byte.score(model, packing, experts=["public", "math"], top_k=2).bits_per_byte
"""

from flexolmo_jax.evaluate.measurement import Candidate, measure, opt_outs
from flexolmo_jax.evaluate.report import Report
from flexolmo_jax.evaluate.stage import evaluate

__all__ = ["Candidate", "Report", "evaluate", "measure", "opt_outs"]
