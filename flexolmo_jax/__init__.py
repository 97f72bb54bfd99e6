"""FlexOlmo in JAX: modular language models whose experts are trained apart and merged offline.

import flexolmo_jax as fo

model = fo.load("runs/demo/merged")
logits = model(ids, experts=["public", "math"], top_k=2)
fo.merge(anchor, contributions, out)
fo.export_hf(checkpoint, out)
fo.import_hf(directory, out)
"""

import importlib
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "LanguageModel": "flexolmo_jax.infer",
    "ModelConfig": "flexolmo_jax.model",
    "UserError": "flexolmo_jax.errors",
    "export_hf": "flexolmo_jax.hf",
    "import_hf": "flexolmo_jax.hf",
    "load": "flexolmo_jax.infer",
    "merge": "flexolmo_jax.merge",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    """Imports a public name from its home when it is first asked for, so that importing the package costs nothing."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
