"""Alerts, transcripts and the page of a run."""

import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from tests.train.programs import problems_and_tokenizer
from tests.train.test_cispo import made_up
from train.cispo_config import AlertsConfig
from train.report import main, write_report
from train.watch import Health, Transcripts, read_transcripts, rollout_metrics, task_rates

PROBLEMS, TOKENIZER = problems_and_tokenizer(8)
WELL = {"entropy": 1.0, "grad_norm": 0.3, "probability/correlation": 0.999, "truncated": 0.0}


def groups():
    rewards = np.array([[0, 1, 1], [0, 0, 0]], np.float32)
    made = made_up(rewards)
    return [
        g._replace(components={"correct": g.rewards, "overlong": -g.rewards / 4}, failures=1)
        for g in made
    ]


def test_metrics_of_a_batch():
    batch = groups()
    batch[1] = batch[1]._replace(reasons=("length", "repetition", "stop"))
    metrics = rollout_metrics(batch, batch[:1], 4)
    drawn = np.concatenate([g.behaviour[(g.behaviour < 0) & ~g.forced] for g in batch])
    lengths = np.concatenate([g.lengths for g in batch])
    expected = {
        "reward": 1 / 3,
        "reward/correct": 1 / 3,
        "reward/overlong": -1 / 12,
        "groups_kept": 0.5,
        "batch_full": 1,
        "length": lengths.mean(),
        "truncated": 1 / 6,
        "repetition_halts": 1 / 6,
        "verifier_failures": 2,
        "entropy": -drawn.mean(),
        "staleness/max": 4,
        "tokens_trained": batch[0].lengths.sum(),
    }
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-6, err_msg=name)
    np.testing.assert_allclose(list(task_rates(batch, PROBLEMS).values()), [1 / 3], rtol=1e-6)


def test_a_batch_for_which_nothing_was_sampled_tells_of_what_it_takes_alone():
    batch = groups()
    metrics = rollout_metrics([], batch, 4)
    whole = rollout_metrics(batch, batch, 4)
    same = ("tokens_trained", "batch_full", "staleness/mean", "staleness/max")
    expected = {name: whole[name] for name in same} | {"tokens_sampled": 0, "groups_sampled": 0}
    assert metrics == expected


def test_nothing_is_wrong_with_a_healthy_run():
    health = Health(AlertsConfig(after=0, min_entropy=0.1, max_grad_norm=1.0))
    assert not any(health.check(step, WELL) for step in range(1, 50))


@pytest.mark.parametrize(
    ("cfg", "metrics", "says"),
    [
        ({"min_entropy": 0.2}, {"entropy": 0.1}, "alerts.min_entropy is 0.2: the policy has"),
        ({"max_grad_norm": 5.0}, {"grad_norm": 9.0}, "alerts.max_grad_norm is 5: gradients blow"),
        ({"min_correlation": 0.99}, {"probability/correlation": 0.9}, "sampler and trainer"),
        ({"max_truncated": 0.2}, {"truncated": 0.5}, "answers do not end"),
    ],
)
def test_illness_that_lasts_stops_the_run(cfg, metrics, says):
    health = Health(AlertsConfig(after=3, patience=2, **cfg))
    ill = WELL | metrics
    told = [health.check(step, ill) for step in (1, 2, 3)]
    assert told == [None] * 3, "the first batches are let pass"
    assert says in health.check(4, ill)
    health = Health(AlertsConfig(after=0, patience=2, **cfg))
    assert [health.check(s, m) for s, m in ((1, ill), (2, WELL), (3, ill))] == [None] * 3


def test_what_is_not_finite_stops_the_run_at_once():
    message = Health(AlertsConfig()).check(1, WELL | {"grad_norm": float("nan")})
    assert "grad_norm is not finite at step 1" in message


@pytest.fixture
def workdir(tmp_path):
    transcripts = Transcripts(tmp_path, 0)
    for step in (0, 1, 2):
        transcripts.write(step, "held-out", groups(), PROBLEMS, TOKENIZER)
        transcripts.write(step + 1, "training", groups(), PROBLEMS, TOKENIZER)
    records = [{"step": s, "reward": s / 4, "reward/<b>": 1.0, "entropy": 2.0} for s in (1, 2, 3)]
    records[1]["grad_norm"] = float("inf")
    text = "".join(json.dumps(r) + "\n" for r in records)
    (tmp_path / "metrics.jsonl").write_text(text)
    return tmp_path


def test_transcripts_of_later_steps_are_taken_out_on_resume(workdir):
    with (workdir / "transcripts.jsonl").open("a") as file:
        file.write('{"step": 2, "cut sh')
    Transcripts(workdir, 1)
    lines = read_transcripts(workdir)
    assert {t["step"] for t in lines} == {0, 1}
    # The best and the worst sample of two groups, one of which has all alike.
    assert [t["reward"] for t in lines if t["step"] == 0] == [1, 0, 0]
    assert lines[0]["question"] == PROBLEMS[0].question


class Page(HTMLParser):
    """Checks that what is opened is closed, and collects what would load something."""

    def __init__(self):
        super().__init__()
        self.open, self.loaded = [], []

    def handle_starttag(self, tag, attrs):
        if tag not in ("meta", "input", "polyline", "circle", "path"):
            self.open.append(tag)
        self.loaded += [v for k, v in attrs if k in ("src", "href")]

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_page_of_a_run_stands_alone(workdir):
    text = write_report(workdir).read_text()
    page = Page()
    page.feed(text)
    assert not page.open
    assert not page.loaded
    assert not re.search(r"https?://", text)
    assert text.count("<polyline") == 3  # reward, its component, entropy
    assert "reward/&lt;b&gt;" in text
    assert "before and after" in text
    assert PROBLEMS[0].question in text
    assert text.count('class="entry"') == 1 + 9


def test_page_by_command(workdir, tmp_path, capsys):
    assert main([str(workdir)]) == 0
    assert capsys.readouterr().out.strip() == str(workdir / "report.html")
    assert main([str(tmp_path / "nowhere")]) == 2
    assert "has no metrics.jsonl" in capsys.readouterr().err
