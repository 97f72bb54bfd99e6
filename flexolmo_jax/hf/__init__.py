"""Hugging Face directories, in and out: export, import and the proof that both programs compute the same."""

from flexolmo_jax.hf.export import Export, export_hf
from flexolmo_jax.hf.importing import HfModel, Import, import_hf, read_hf
from flexolmo_jax.hf.verify import Comparison, verify_hf

__all__ = ["Comparison", "Export", "HfModel", "Import", "export_hf", "import_hf", "read_hf", "verify_hf"]
