"""Imports point one way, and the wheel holds what it should and works outside the checkout."""

import ast
import os
import re
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
SHIPPED = {"kernels_pallas", "mmjax"}


def _import_names(requirements):
    """The modules that requirements like `flax>=0.12` give, where the name alone does not tell."""
    renamed = {"absl-py": "absl", "gin-config": "gin", "orbax-checkpoint": "orbax", "pillow": "PIL"}
    names = [re.match(r"[\w.-]+", requirement)[0] for requirement in requirements]
    return {renamed.get(name, name.replace("-", "_")) for name in names}


RUNTIME = _import_names(PROJECT["dependencies"])
TRAINING = _import_names(PROJECT["optional-dependencies"]["train"])
SERVING = _import_names(PROJECT["optional-dependencies"]["serve"])

# kernels_pallas <- mmjax <- train <- configs: what each may import beside itself and the standard
# library. The middle two follow pyproject.toml, so nothing is used without being declared.
ALLOWED = {
    "kernels_pallas": {"jax", "jaxtyping", "numpy"},
    "mmjax": RUNTIME | {"kernels_pallas"},
    "train": RUNTIME | TRAINING | {"kernels_pallas", "mmjax"},
    "configs": {"ml_collections"},  # Plain values, so that any tool can read a config.
}


def _imports(path):
    """(line, top-level module) of every absolute import in a file, those inside functions too."""
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name.split(".")[0]) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.lineno, node.module.split(".")[0]


def _allowed(package, path):
    """The server alone may use what the extra `serve` installs."""
    serving = SERVING if path.is_relative_to(ROOT / "mmjax" / "serve") else set()
    return ALLOWED[package] | serving | {package} | sys.stdlib_module_names


@pytest.mark.parametrize("package", ALLOWED)
def test_imports_point_one_way(package):
    files = sorted((ROOT / package).rglob("*.py"))
    assert files, f"no Python file under {package}/"
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {module}"
        for path in files
        for line, module in _imports(path)
        if module not in _allowed(package, path)
    ]
    assert not wrong, f"{package} may import {sorted(ALLOWED[package])} only:\n" + "\n".join(wrong)


def _run(*command, **kwargs):
    result = subprocess.run(
        [sys.executable, *map(str, command)], capture_output=True, text=True, **kwargs
    )
    assert result.returncode == 0, f"{command} failed:\n{result.stdout}\n{result.stderr}"
    return result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The built wheel."""
    out = tmp_path_factory.mktemp("wheel")
    _run("-m", "build", "--wheel", "--no-isolation", "--outdir", out, ROOT)
    (path,) = out.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def wheel_site(wheel, tmp_path_factory):
    """A folder that holds the installed wheel and nothing else."""
    site = tmp_path_factory.mktemp("site")
    _run("-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", site, wheel)
    return site


def _run_outside(site, cwd, *command):
    """Runs Python where only the wheel and its dependencies can be imported.

    `-S` keeps the .pth file of the editable install out, which would bring the checkout back.
    """
    dependencies = dict.fromkeys(sysconfig.get_path(name) for name in ("purelib", "platlib"))
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(site), *dependencies])}
    return _run("-S", *command, cwd=cwd, env=env)


def test_wheel_top_level(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    dist_info = f"{PROJECT['name']}-{PROJECT['version']}.dist-info"
    assert {name.split("/")[0] for name in names} == SHIPPED | {dist_info}
    assert f"{dist_info}/licenses/LICENSE" in names


def test_wheel_holds_every_file_of_the_packages(wheel):
    files = {
        path.relative_to(ROOT).as_posix()
        for package in SHIPPED
        for path in (ROOT / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert {f"{package}/py.typed" for package in SHIPPED} <= files
    assert files <= set(zipfile.ZipFile(wheel).namelist())


def test_wheel_imports_outside_the_checkout(wheel_site, tmp_path):
    program = """
import importlib.metadata, importlib.util
import kernels_pallas, mmjax
print(kernels_pallas.__file__, mmjax.__file__, importlib.util.find_spec("train"), sep="\\n")
(script,) = importlib.metadata.distribution("mmjax").entry_points
print(script.name, callable(script.load()))
"""
    lines = _run_outside(wheel_site, tmp_path, "-c", program).splitlines()
    assert lines == [
        str(wheel_site / "kernels_pallas" / "__init__.py"),
        str(wheel_site / "mmjax" / "__init__.py"),
        "None",
        "mmjax True",
    ]


def test_wheel_command_line_outside_the_checkout(wheel_site, tmp_path):
    text = _run_outside(wheel_site, tmp_path, "-m", "mmjax.cli", "--help")
    assert "usage: mmjax" in text
    assert "convert" in text
    assert "generate" in text
