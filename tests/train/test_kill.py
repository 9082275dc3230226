"""A run that is killed twenty times in a row ends as one that is left alone."""

import os
import subprocess
import sys

import pytest

from tests.train.test_resume import ROOT, untimed

pytestmark = pytest.mark.slow


def test_twenty_kills_in_a_row_change_nothing(tmp_path):
    """While it samples, scores, updates, hands on weights, writes transcripts, checkpoints."""
    seed = os.getpid()
    print(f"seed {seed}")
    done = subprocess.run(
        [sys.executable, "-m", "tests.train.killed_job", str(tmp_path), str(seed)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    assert untimed(killed) == untimed(straight)
    assert sum(m["groups_kept"] > 0 for m in untimed(straight)) >= 3
    for name in ("transcripts.jsonl", "model/model.safetensors"):
        assert (killed / name).read_bytes() == (straight / name).read_bytes(), (name, done.stdout)
