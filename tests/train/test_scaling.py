"""Power laws over a grid of runs: fit, frontier, FLOPs, what is run and what is kept."""

import json
import runpy
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from mmjax.config import ConfigError, ModelConfig
from tests.train.programs import lenient
from train.metrics import read_metrics
from train.optimizer import make_optimizer
from train.scaling import grid
from train.scaling.grid import Run, check_kept, do, points_of, runs_of
from train.scaling.laws import PFLOPS_DAY, PUBLISHED, Point, fit, frontier, train_flops_per_token
from train.scaling.report import report

CONFIG = Path(__file__).parents[2] / "configs" / "scaling_cpu.py"


def config(**changes):
    made = runpy.run_path(str(CONFIG))["get_config"]()
    made.update(changes)
    return made


def test_law_is_found_again():
    """Runs of several sizes whose best losses lie on the paper's law; worse ones do not count."""
    law = PUBLISHED["hybrid"]
    compute = np.geomspace(1e-3, 1e3, 13)
    best = [
        Point("best", c, int(law.parameters.at(c)), int(law.tokens.at(c)), float(law.loss.at(c)))
        for c in compute
    ]
    worse = [p._replace(run="worse", loss=1.01 * p.loss, compute=1.001 * p.compute) for p in best]
    found = fit(frontier([*worse, *best]))
    for ours, theirs in zip(found, law, strict=True):
        assert ours.coefficient == pytest.approx(theirs.coefficient, rel=1e-5)
        assert ours.exponent == pytest.approx(theirs.exponent, abs=1e-6)
        assert ours.r2 == pytest.approx(1, abs=1e-9)


def test_loss_that_is_no_number_is_not_on_the_frontier():
    points = [Point("", 1, 1, 1, float("nan")), Point("", 2, 1, 1, 3.0)]
    assert [p.loss for p in frontier(points)] == [3.0]


def test_frontier_falls():
    points = [Point("", c, 1, 1, loss) for c, loss in [(1, 5), (2, 6), (3, 4), (3, 3.5), (9, 3.6)]]
    assert [(p.compute, p.loss) for p in frontier(points)] == [(1, 5), (3, 3.5)]


@pytest.mark.parametrize(("kind", "core"), [("softmax", 2 * 129 * 64), ("lightning", 4 * 16 * 64)])
def test_flops_are_six_a_weight_and_three_times_attention(kind, core):
    cfg = ModelConfig.tiny(num_layers=2, layer_types=(kind,) * 2)
    d, wide, f, vocab = 64, 64, 128, 256
    projections = 5 * wide * d if kind == "lightning" else 2 * (wide + 32) * d
    weights = 2 * (projections + 2 * 3 * d * f + 4 * d) + d * vocab
    assert train_flops_per_token(cfg, 128) == pytest.approx(6 * weights + 3 * 2 * core)


def test_grid_is_every_kind_at_every_size():
    runs = runs_of(config())
    assert [run.name for run in runs[:2]] == ["softmax-16", "softmax-32"]
    assert len({run.name for run in runs}) == 9
    kinds = {run.kind: run.cfg.model.kinds for run in runs}
    assert kinds["hybrid"] == ("lightning",) * 3 + ("softmax",)
    assert kinds["lightning"] == ("lightning",) * 4
    for size in ("16", "64"):
        widths = {run.cfg.model.hidden_size for run in runs if run.size == size}
        assert widths == {int(size)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": 1}, "unknown .'kind'., missing"),
        ({"kinds": ("linear",)}, "kinds .'linear'.* are to be of"),
        ({"job": {"evaluation": {"every": 0}}}, "evaluation.paths, whose loss"),
    ],
)
def test_wrong_grid(changes, message):
    with pytest.raises(ConfigError, match=message):
        runs_of(config(**changes))


def trained(run, workdir, upto=None):
    """What a run leaves behind: metrics, whose held-out loss falls with size and steps."""
    cfg = run.cfg
    (workdir / run.name).mkdir(parents=True, exist_ok=True)
    lines = []
    for step in range(1, (upto or cfg.steps) + 1):
        record = {"step": step, "loss": 3.0}
        if step % cfg.evaluation.every == 0 or step == cfg.steps:
            record["eval/loss"] = 5 * cfg.model.hidden_size**-0.1 * step**-0.05
        lines.append(json.dumps(record) + "\n")
    (workdir / run.name / "metrics.jsonl").unlink(missing_ok=True)
    (workdir / run.name / "config.json").write_text(json.dumps(grid._flat(cfg)))
    (workdir / run.name / "metrics.jsonl").write_text("".join(lines))


def test_finished_runs_are_kept_and_others_resumed(tmp_path, monkeypatch):
    finished, stopped, new = runs_of(config())[:3]
    trained(finished, tmp_path)
    trained(stopped, tmp_path, upto=170)
    started = []
    monkeypatch.setattr(grid, "run_task", lambda cfg, workdir: started.append(workdir.name))
    for run in (finished, stopped, new):
        do(run, tmp_path)
    assert started == [stopped.name, new.name]
    tokens = [point.tokens for point in points_of(stopped, tmp_path)]
    assert tokens == [n * 2048 for n in (40, 80, 120, 160)]
    (first, *_) = points_of(finished, tmp_path)
    each = train_flops_per_token(finished.cfg.model, 256)
    assert first.compute * PFLOPS_DAY == pytest.approx(each * 40 * 2048)


def test_runs_of_another_config_are_not_taken_for_these(tmp_path):
    trained(runs_of(config())[0], tmp_path)
    other = config()
    other.job.optimizer.learning_rate = 0.12
    with pytest.raises(ConfigError, match=r"1 keys differ: optimizer.learning_rate was .* is 0.12"):
        check_kept(runs_of(other), tmp_path)
    check_kept(runs_of(config()), tmp_path)


def test_too_few_points_are_no_law(tmp_path, capsys):
    small = config()
    del small.sizes["32"], small.sizes["64"]
    small.job.steps, small.job.evaluation.every = 10, 5
    with pytest.raises(ConfigError, match=r"3 points, 1 sizes with evaluation.every 5 in 10 steps"):
        runs_of(small)
    runs = runs_of(config(kinds=("hybrid",)))
    trained(runs[0], tmp_path, upto=2 * runs[0].cfg.evaluation.every)
    report(runs, tmp_path, Console(width=200))
    told = capsys.readouterr().out
    assert "hybrid: a law needs 3 points on the frontier, got 2; take more sizes" in told
    found = json.loads((tmp_path / "scaling.json").read_text())["hybrid"]
    assert found["laws"] == {}
    assert len(found["points"]) == 2


def test_laws_are_printed_written_and_drawn(tmp_path, capsys):
    runs = runs_of(config())
    for run in runs:
        trained(run, tmp_path)
    report(runs, tmp_path, Console(width=200))
    found = json.loads((tmp_path / "scaling.json").read_text())
    assert set(found) == {"softmax", "lightning", "hybrid"}
    assert len(found["hybrid"]["points"]) == 30
    assert -0.2 < found["hybrid"]["laws"]["loss"]["exponent"] < 0
    assert "3.4797 C^-0.0763" in capsys.readouterr().out
    assert "hybrid" in (tmp_path / "scaling.svg").read_text()


@pytest.mark.slow
def test_run_of_the_grid_ends_in_points(tmp_path, monkeypatch):
    monkeypatch.setattr("train.job.make_optimizer", lambda *args: lenient(make_optimizer(*args)))
    (tmp_path / "a.txt").write_text("def f(x):\n    return x + 1\n" * 60)
    grid_config = config(kinds=("hybrid",))
    grid_config.job.update({"steps": 3})
    grid_config.job.data.update({"paths": (str(tmp_path / "a.txt"),), "sequence_length": 32})
    grid_config.job.evaluation.update(
        {"paths": (str(tmp_path / "a.txt"),), "every": 2, "lengths": (32,)}
    )
    run: Run = runs_of(grid_config)[0]
    do(run, tmp_path)
    assert do(run, tmp_path) is None
    assert len(read_metrics(tmp_path / run.name)) == 3
    losses = [point.loss for point in points_of(run, tmp_path)]
    assert len(losses) == 2
    assert losses[1] < losses[0] < 6
