"""The Colabs: a program and a notebook of the same cells; with -m colabs, their claims hold."""

import json
import os
import re
import subprocess
import sys
import time

import pytest

from tests.docs.blocks import ROOT

COLABS = sorted((ROOT / "colabs").glob("*.py"))
# Of idle cores; tests on busy ones only see to it that a Colab ends.
SECONDS = 600


def _cells(path):
    """(kind, source) of each cell of a program in percent form."""
    parts = re.split(r"^# %%(.*)$", path.read_text(), flags=re.M)[1:]
    cells = []
    for head, body in zip(parts[::2], parts[1::2], strict=True):
        text = body.strip("\n")
        if "[markdown]" in head:
            text = re.sub(r"^# ?", "", text, flags=re.M)
        cells.append(("markdown" if "[markdown]" in head else "code", text))
    return cells


@pytest.mark.parametrize("path", COLABS, ids=lambda p: p.stem)
def test_the_notebook_has_the_cells_of_the_program(path):
    notebook = json.loads(path.with_suffix(".ipynb").read_text())
    cells = [(c["cell_type"], "".join(c["source"]).strip("\n")) for c in notebook["cells"]]
    assert cells == _cells(path), f"run: jupytext --to ipynb colabs/{path.name}"


def test_all_begin_alike():
    """The cell that fetches mmjax is one text."""
    first = {
        path.stem: next(text for kind, text in _cells(path) if kind == "code") for path in COLABS
    }
    assert len(COLABS) == 5
    assert len(set(first.values())) == 1, first.keys()
    assert "git" in next(iter(first.values()))


@pytest.mark.parametrize("path", COLABS, ids=lambda p: p.stem)
def test_it_ends_in_a_check(path):
    kind, text = _cells(path)[-1]
    assert kind == "code"
    assert "assert" in text


@pytest.mark.colabs
@pytest.mark.parametrize("path", COLABS, ids=lambda p: p.stem)
def test_its_claims_hold_at_the_small_setting(path, tmp_path):
    listed = subprocess.check_output(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT)
    # A checkout of its own, since a Colab goes on from what it finds in runs/.
    for folder in {name.split("/")[0] for name in listed.decode().split("\n") if name}:
        if folder != "runs":
            (tmp_path / folder).symlink_to(ROOT / folder)
    quick = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    flags = {} if path.stem == "lightning_attention" else {"XLA_FLAGS": quick}
    own = {"MMJAX_COLAB_SMALL": "1", "MPLBACKEND": "Agg", "JAX_PLATFORMS": "cpu"} | flags
    start = time.monotonic()
    result = subprocess.run(
        [sys.executable, "-W", "error", ROOT / "colabs" / path.name],
        cwd=tmp_path,
        env=os.environ | own,
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert result.returncode == 0, f"{result.stdout}\n{result.stderr}"
    print(f"{path.stem}: {time.monotonic() - start:.0f} s")
