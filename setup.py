"""Metadata and dependencies of `flexolmo_jax`."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent


def _version() -> str:
    match = re.search(r'^__version__ = "(.+)"', (HERE / "flexolmo_jax/__init__.py").read_text(), re.MULTILINE)
    if match is None:
        raise RuntimeError("flexolmo_jax/__init__.py has no __version__")
    return match[1]


def _readme() -> str:
    file = HERE / "README.md"
    return file.read_text(encoding="utf-8") if file.exists() else ""


setup(
    name="flexolmo_jax",
    version=_version(),
    description="FlexOlmo in JAX: language models whose experts are trained apart and merged offline",
    long_description=_readme(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["flexolmo_jax", "flexolmo_jax.*"]),
    package_data={"flexolmo_jax.hf": ["*.txt"]},
    python_requires=">=3.11",
    install_requires=[
        "absl-py>=2",
        # jax 0.11 drops Python 3.11, and flax 0.12 does not yet work with all of it.
        "jax>=0.10.2,<0.11",
        "flax>=0.12.8,<0.13",
        "optax>=0.2.8,<0.3",
        # The v1 interface still moves between minor versions.
        "orbax-checkpoint>=0.12.8,<0.13",
        "tensorstore>=0.1.84,<0.2",
        "grain>=0.2.18,<0.3",
        "seqio>=0.0.20,<0.1",
        "array_record>=0.8.3,<0.9",
        "fsspec>=2025.3",
        "pyarrow>=20",
        "sentencepiece>=0.2,<0.2.2",  # from 0.2.2 on it wants a newer protobuf than Apache Beam allows
        "datasketch>=2,<3",
        "gin-config>=0.5,<0.6",
        "numpy>=2,<3",
        "ml-dtypes>=0.5,<1",
        "jaxtyping>=0.3.11,<0.4",
        "safetensors>=0.8,<0.9",
        "scikit-learn>=1.7,<2",
        "scipy>=1.13,<2",
        "tokenizers>=0.23.1,<0.24",
        "cryptography>=46,<51",
        "matplotlib>=3.10,<4",
        "rich>=14,<16",
    ],
    extras_require={
        "tpu": ["jax[tpu]"],
        # The TPU compiler that fits our jax, for planning on a machine without a TPU.
        "plan": ["jax[tpu]"],
        "cuda": ["jax[cuda13]", "tokamax>=0.0.12,<0.1"],
        "beam": ["apache-beam>=2.70,<3"],
        "hf": ["transformers>=5,<6", "torch>=2.10,<3"],
        "encoder": ["sentence-transformers>=5.7,<6"],
        "eval": ["lm-eval>=0.4.9,<0.5"],
        "privacy": ["jax-privacy>=2,<3"],
        "serve": ["starlette>=1,<2", "uvicorn>=0.40,<1"],
        "dev": [
            "beartype>=0.22,<0.24",
            "hypothesis>=6.140,<7",
            "mypy>=2,<3",
            "pytest>=9,<10",
            "pytest-timeout>=2.4,<3",
            "pytest-xdist>=3.8,<4",
            "ruff>=0.17,<0.18",
            "tokamax>=0.0.12,<0.1",  # its kernels for GPUs, interpreted
        ],
    },
    entry_points={"console_scripts": ["flexolmo = flexolmo_jax.__main__:main"]},
    classifiers=[
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
