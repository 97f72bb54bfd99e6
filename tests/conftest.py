"""What all tests share: the CPU backend, checked shapes, and compiled programs kept between runs."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

from jaxtyping import install_import_hook

# Arrays' shapes are checked against the signatures in these rooms, only while testing: a user does not pay for it.
ROOMS_WITH_SHAPES = ("moe", "model", "parallel", "train", "domain", "infer")
CHECKER = "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))"
install_import_hook([f"flexolmo_jax.{room}" for room in ROOMS_WITH_SHAPES], CHECKER)


def pytest_configure(config):
    """Keeps compiled programs in pytest's cache directory, so that a second run compiles nothing."""
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(config.cache.mkdir("jax")))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
