"""`python -m train` with something wrong: one clear message, an exit code, nothing left behind."""

import os
import subprocess
import sys

import pytest

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


@pytest.mark.parametrize(
    ("argument", "body", "says"),
    [
        (":b", "raise ValueError(f'unknown stage {stage!r}')", ":b: line 2: unknown stage 'b'"),
        ("", "return {'task': 'sft'}", "returns no ConfigDict but a dict"),
        ("", "return stage.name", "line 2: AttributeError: 'str' object has no attribute 'name'"),
    ],
)
def test_config_file_that_fails(tmp_path, argument, body, says):
    file = tmp_path / "job.py"
    file.write_text(f"def get_config(stage='a'):\n    {body}\n")
    check(tmp_path, run(tmp_path, config=f"{file}{argument}"), "error: ", "job.py", says)


def test_numbers_out_of_range_are_told_together(tmp_path):
    flags = ("--config.data.batch_size=0", "--config.optimizer.b1=2.0")
    stages = ({"name": "x", "tokens": 300, "sequence_length": -1},)
    outcome = run(tmp_path, *flags, stages=stages, steps=3)
    check(tmp_path, outcome, "batch_size must be positive, got 0", "b1 must be", "got -1")


def test_workdir_that_is_a_file(tmp_path):
    (tmp_path / "work").write_text("")
    check(tmp_path, run(tmp_path), "error: --workdir=", "work is no folder")


def test_a_bug_keeps_its_traceback(tmp_path):
    file = tmp_path / "job.py"
    file.write_text("import nothing_of_this_name\n")
    code, said = run(tmp_path, config=file)
    assert code == 1
    assert "Traceback" in said


def test_unknown_positional_argument(tmp_path):
    check(tmp_path, run(tmp_path, "steps=3"), "unexpected argument 'steps=3'", code=1)
