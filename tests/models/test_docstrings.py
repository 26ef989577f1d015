import doctest
import importlib
import pkgutil

import pytest

import coterie.models

MODULES = [module.name for module in pkgutil.walk_packages(coterie.models.__path__, "coterie.models.")]


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_in_the_docstrings_run(name: str) -> None:
    assert doctest.testmod(importlib.import_module(name)).failed == 0
