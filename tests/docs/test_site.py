"""The site's generated pages: every public name, key, error and file has its place."""

import ast
import importlib
import pkgutil
import re
import subprocess

import pytest
import yaml

import kernels_pallas
import mmjax
from docs.generate import errors, gallery, pages, reference
from tests.docs.blocks import ROOT


def _public_modules():
    for package in (mmjax, kernels_pallas):
        found = pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
        yield package
        yield from (importlib.import_module(m.name) for m in found if m.ispkg)


def test_every_public_name_is_in_the_reference():
    told = {
        id(getattr(importlib.import_module(module), name))
        for module, names in reference.entries().items()
        for name in names
    }
    missing = [
        f"{module.__name__}.{name}"
        for module in _public_modules()
        for name in getattr(module, "__all__", ())
        if id(getattr(module, name)) not in told
    ]
    assert not missing
    assert "mmjax.Engine" in "".join(reference.api_pages().values())


def test_every_name_of_the_reference_has_a_docstring():
    for module, names in reference.entries().items():
        for name in names:
            value = getattr(importlib.import_module(module), name)
            assert getattr(value, "__doc__", None), f"{module}.{name}"


def test_every_key_of_a_job_is_in_the_config_reference():
    page = reference.config_page()
    for name, section in reference.config_sections():
        for field in reference.keys(section):
            key = f"{name}.{field.name}" if name else field.name
            assert f"| `{key}` |" in page


def test_every_error_class_has_a_cause_and_a_way_out():
    defined = set()
    for package in errors.PACKAGES:
        for file in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                is_error = isinstance(node, ast.ClassDef) and node.name.endswith("Error")
                if is_error and not node.name.startswith("_"):
                    defined.add(node.name)
    assert defined == set(errors.KINDS)


def test_every_error_class_has_messages():
    found = errors.messages()
    assert all(found.values()), [name for name, told in found.items() if not told]
    texts = [m.text for m in found["UnavailableError"]]
    assert any("cannot run" in text and "⟨" in text for text in texts)
    known = {p.removesuffix(".md") for p in [*pages.included().values(), "reference/config.md"]}
    known |= {file.stem for file in (ROOT / "docs").glob("*.md")}
    assert {kind.page for kind in errors.KINDS.values()} <= known


def test_the_gallery_has_every_config():
    names = [example.name for example in gallery.examples()]
    assert names == sorted(f.stem for f in (ROOT / "configs").glob("[a-z]*.py"))
    page = gallery.page()
    assert all(f"## {name}" in page for name in names)


def test_a_config_without_its_command_is_refused():
    with pytest.raises(ValueError, match="Hardware and time"):
        gallery.read_example("bare", "A job.\n\nIt runs.\n")


def test_every_page_is_in_the_navigation_once():
    listed = [
        page
        for section in pages.navigation(["reference/config.md"])
        for group in section.values()
        for page in group
    ]
    assert len(listed) == len(set(listed))
    assert {f.name for f in (ROOT / "docs").glob("*.md")} <= set(listed)
    assert {f"results/{f.name}" for f in (ROOT / "benchmarks/results").glob("*.md")} <= set(listed)


def test_every_result_says_the_command_that_makes_it():
    ours = re.compile(r"(`|    )(python3? -m|make|mmjax) |`(kernels_pallas|benchmarks|train)\.")
    for file in (ROOT / "benchmarks" / "results").glob("*.md"):
        assert ours.search(file.read_text()), file.name


@pytest.mark.parametrize(
    ("link", "expected"),
    [
        ("[a](../benchmarks/results/serve_cpu.md)", "[a](results/serve_cpu.md)"),
        ("[a](engine.md#speed)", "[a](engine.md#speed)"),
        ("[a](../configs/demo.py)", "[a](gallery.md#demo)"),
        ("[a](../mmjax/model.py)", "a"),
        ("![a](images/layers.svg)", "![a](images/layers.svg)"),
        ("[a](https://example.org/x.md)", "[a](https://example.org/x.md)"),
        ("[a](nowhere.md)", "[a](nowhere.md)"),
        ("```sh\n[a](../configs/demo.py)\n```\n", "```sh\n[a](../configs/demo.py)\n```\n"),
    ],
)
def test_links_between_files_become_links_between_pages(link, expected):
    assert pages.relink(link, "docs/plan.md", "plan.md", pages.targets()) == expected


def test_relative_links_of_all_pages_lead_somewhere():
    wrong = []
    files = [ROOT / source for source in pages.included()] + list((ROOT / "docs").glob("*.md"))
    generated = {"reference", "gallery.md"}
    for file in files:
        text = re.sub(r"^```.*?^```", "", file.read_text(), flags=re.M | re.S)
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
            own = target.split("/")[0] in generated
            if not re.match(r"[a-z]+:", target) and not own:
                wrong += [f"{file.name}: {target}"] * (not (file.parent / target).exists())
    assert not wrong


def test_the_walks_of_contributing_name_files_that_exist():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    walk = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    tops = ("mmjax", "train", "configs", "kernels_pallas", "docs", "tests", "benchmarks", "scripts")
    named = [p for p in re.findall(r"`([\w./-]+/[\w./-]*)`", walk) if p.split("/")[0] in tops]
    assert len(named) > 40
    missing = [path for path in named if not (ROOT / path).exists()]
    assert not missing


def test_bare_file_names_of_the_walks_exist():
    """`tiles.py` after `mmjax/vision/` is a file of that folder, or of one named before."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    names = {path.name for path in ROOT.glob("*/**/*.py") if ".venv" not in path.parts}
    bare = re.findall(r"`([a-z_]+\.py)`", text)
    assert bare
    assert not [name for name in bare if name not in names and name != "mosaic_gpu.py"]


def test_issue_templates_are_forms():
    for file in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"):
        form = yaml.safe_load(file.read_text())
        if file.name != "config.yml":
            assert form["name"]
            assert form["description"]
            assert all(item["attributes"]["label"] for item in form["body"])


@pytest.mark.parametrize(
    ("arguments", "fault"),
    [
        ([], "VERSION must look like"),
        (["1.2"], "VERSION must look like"),
        (["9.9.9"], "pyproject.toml has version"),
        (["0.1.0", "--force"], "unknown option"),
    ],
)
def test_a_release_is_refused(arguments, fault):
    import os
    import sys

    result = subprocess.run(
        [ROOT / "scripts" / "release.sh", *arguments],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHON": sys.executable},
    )
    assert result.returncode == 1
    assert fault in result.stderr
