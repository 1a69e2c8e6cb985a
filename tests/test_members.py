"""What the packages of the workspace say of themselves must agree with the layers."""

import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent
LAYERS = ("aios-model", "aios-kvcache", "aios-sched", "aios-parallel", "aios-quant", "aios-serve")  # from the bottom up
SIBLINGS = {"aios-parallel", "aios-quant"}
HTTP_LIBRARIES = {"fastapi", "starlette", "uvicorn", "pydantic", "prometheus-client"}


def project(folder: Path) -> dict:
    return tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def dependencies(layer: str) -> set[str]:
    return {Requirement(text).name for text in project(ROOT / "packages" / layer).get("dependencies", [])}


def test_every_package_is_a_layer() -> None:
    assert sorted(folder.name for folder in (ROOT / "packages").iterdir() if folder.is_dir()) == sorted(LAYERS)


@pytest.mark.parametrize("layer", LAYERS)
def test_a_package_depends_only_on_the_layers_below_it(layer: str) -> None:
    below = set(LAYERS[: LAYERS.index(layer)]) - (SIBLINGS if layer in SIBLINGS else set())
    assert dependencies(layer) & set(LAYERS) <= below


@pytest.mark.parametrize("layer", LAYERS[:-1])
def test_http_libraries_are_dependencies_of_the_top_layer_only(layer: str) -> None:
    assert not dependencies(layer) & HTTP_LIBRARIES


@pytest.mark.parametrize("layer", LAYERS)
def test_no_package_depends_on_an_oracle(layer: str) -> None:
    assert not dependencies(layer) & {"transformers", "gguf", "openai"}


@pytest.mark.parametrize("layer", LAYERS)
def test_a_package_has_version_and_python_of_the_workspace(layer: str) -> None:
    root, member = project(ROOT), project(ROOT / "packages" / layer)
    assert member["name"] == layer
    for key in ("version", "requires-python", "license"):
        assert member[key] == root[key], key


@pytest.mark.parametrize("layer", LAYERS)
def test_a_package_ships_its_types_and_a_readme(layer: str) -> None:
    folder = ROOT / "packages" / layer
    assert (folder / "src" / layer.replace("-", "_") / "py.typed").is_file()
    assert len((folder / "README.md").read_text(encoding="utf-8").splitlines()) > 10
