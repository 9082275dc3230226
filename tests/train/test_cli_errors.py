"""`python -m train` with something wrong: one clear message, an exit code, nothing left behind."""

import os
import subprocess
import sys

from tests.train.test_resume import QUICK, ROOT, write_config


def run(folder, *arguments, config=None, task="pretrain", **changes):
    """(exit code, stderr)."""
    file = config or write_config(folder, task, **changes)
    command = [sys.executable, "-m", "train", f"--config={file}", f"--workdir={folder / 'work'}"]
    done = subprocess.run(
        [*command, *arguments],
        cwd=ROOT,
        env=os.environ | QUICK,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    return done.returncode, done.stderr


def check(folder, outcome, *parts, code=2):
    exit_code, said = outcome
    assert exit_code == code, said
    assert "Traceback" not in said
    assert len(said.strip().splitlines()) == 1, said
    for part in parts:
        assert part in said
    assert not (folder / "work" / "checkpoints").exists()


def test_typos_in_file_and_flags_are_named_together(tmp_path):
    outcome = run(tmp_path, "--config.stpes=3", "--config.cispo.tau=1", model={"num_layrs": 2})
    answers = ("stpes; did you mean steps?", "did you mean model.num_layers?", "cispo.tau")
    check(tmp_path, outcome, "error: job config: ", *answers)


def test_typo_in_the_section_of_a_flag(tmp_path):
    outcome = run(tmp_path, "--config.optimzer.learning_rate=1")
    check(tmp_path, outcome, "error: ", 'Did you mean "optimizer"')


def test_mesh_that_does_not_divide_and_keys_that_the_file_leaves_out(tmp_path):
    """Both flags name sections that the file does not have, and neither is a typo."""
    outcome = run(tmp_path, "--config.mesh.data=3", "--config.optimizer.clip_norm=0.5")
    check(tmp_path, outcome, "error: mesh data=3", "needs 3 devices, there are 1")


def test_missing_model_to_start_from(tmp_path):
    outcome = run(tmp_path, task="cispo", init_from=str(tmp_path / "nowhere"))
    check(tmp_path, outcome, str(tmp_path / "nowhere"), "does not exist")


def test_missing_config_file(tmp_path):
    code, said = run(tmp_path, config="nowhere.py")
    assert code == 2
    assert "nowhere.py" in said
    assert "Traceback" not in said


def test_unknown_positional_argument(tmp_path):
    check(tmp_path, run(tmp_path, "steps=3"), "unexpected argument 'steps=3'", code=1)
