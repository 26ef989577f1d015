"""What is installed is what the checkout holds: a package that is not listed is missing from a wheel."""

import importlib
import tomllib
from importlib.metadata import entry_points, version
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
PARTS = ("models", "search", "service")
SETUPTOOLS: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]


@pytest.mark.skipif(not (ROOT / "service").exists(), reason="the wheel is tested without the checkout")
def test_every_folder_of_modules_is_listed_as_a_package() -> None:
    folders = {file.parent for part in PARTS for file in (ROOT / part).rglob("*.py")}
    found = {"coterie." + ".".join(folder.relative_to(ROOT).parts) for folder in folders}
    assert found == set(SETUPTOOLS["packages"])
    for folder in folders:
        assert (folder / "__init__.py").exists(), folder


@pytest.mark.skipif(not (ROOT / "service").exists(), reason="the wheel is tested without the checkout")
def test_every_file_that_is_no_module_is_listed_as_package_data() -> None:
    found = {
        file.relative_to(ROOT)
        for part in PARTS
        for file in (ROOT / part).rglob("*")
        if file.is_file() and file.suffix not in (".py", ".pyc")
    }
    listed = {
        file.relative_to(ROOT)
        for package, patterns in SETUPTOOLS["package-data"].items()
        for pattern in patterns
        for file in ROOT.joinpath(*package.split(".")[1:]).glob(pattern)
    }
    assert found == listed


@pytest.mark.parametrize("package", SETUPTOOLS["packages"])
def test_every_package_is_installed_with_its_data(package: str) -> None:
    importlib.import_module(package)
    patterns = SETUPTOOLS["package-data"].get(package, [])
    for pattern in patterns:
        folder, _, name = pattern.rpartition("/")
        present = [entry.name for entry in files(package).joinpath(folder).iterdir()]
        assert any(Path(entry).match(name) for entry in present), pattern


def test_the_command_and_the_data_sources_are_registered() -> None:
    assert version("coterie")
    [command] = entry_points(group="console_scripts", name="coterie")
    assert callable(command.load())
    assert "digits" in entry_points(group="coterie.datasets").names
