"""A model and the rows that most tests here use."""

import pytest
from small_models import CONFIG, NAMES, ROW, TEXTS, documents, fresh_params

from flexolmo_jax.data.packing import Packing
from flexolmo_jax.infer import LanguageModel


@pytest.fixture(scope="session")
def model() -> LanguageModel:
    return LanguageModel(CONFIG, NAMES, fresh_params(), 2)


@pytest.fixture(scope="session")
def packing() -> Packing:
    return Packing(documents(*TEXTS), ROW)
