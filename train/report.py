"""`python -m train.report WORKDIR`: one HTML page of a reinforcement run, read without a network.

Curves as inline SVG, answers to held-out questions before and after, samples of the training with a
search over their text. docs/reinforcement.md says how to read it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from train.metrics import read_metrics
from train.watch import read_transcripts

# Title of a figure, and the metrics in it; a name that ends with / stands for all that begin so.
FIGURES = (
    ("Reward", ("reward", "reward/")),
    ("Held-out accuracy, greedy", ("eval/initial_accuracy", "eval/accuracy", "eval/accuracy/")),
    ("Pass rate by task", ("pass/",)),
    ("Entropy of the sampler, nats", ("entropy",)),
    ("Importance ratio", ("ratio/mean", "ratio/max")),
    ("Tokens at a bound, by sign of the advantage", ("clipped/positive", "clipped/negative")),
    ("Sampler and trainer: correlation of probabilities", ("probability/correlation",)),
    (
        "Sampler and trainer: difference of probabilities",
        ("probability/difference_max", "probability/difference_mean"),
    ),
    ("Gradient norm before clipping", ("grad_norm",)),
    ("Length, tokens", ("length", "length/p99", "window")),
    ("Ended otherwise than by themselves", ("truncated", "repetition_halts", "interrupted")),
    ("Groups with a signal", ("groups_kept", "batch_full")),
    ("Staleness, batches", ("staleness/mean", "staleness/max")),
    ("Tokens a second", ("tokens_per_second/",)),
    ("Seconds a batch", ("seconds/",)),
)
_COLOURS = ("#1f6fb4", "#d1603d", "#3c8d53", "#8a5fb0", "#b08a2e", "#5a6b78", "#c2477f", "#2a9d9d")
_WIDTH, _HEIGHT, _LEFT, _BOTTOM = 420, 180, 52, 22
# Transcripts of the training on the page, spread over the run.
_SHOWN = 400


def write_report(workdir: Path) -> Path:
    """Writes `report.html` into the folder of a run, and gives its path.

    Raises:
      FileNotFoundError: the folder has no metrics.
    """
    metrics = read_metrics(workdir)
    if not metrics:
        raise FileNotFoundError(
            f"{workdir} has no metrics.jsonl with a step; is it a job's workdir?"
        )
    transcripts = read_transcripts(workdir)
    body = [
        f"<h1>{escape(workdir.resolve().name)}</h1>",
        _summary(metrics),
        '<div class="figures">',
        *(figure(title, _chosen(metrics, names)) for title, names in FIGURES),
        "</div>",
        *_before_and_after([t for t in transcripts if t["kind"] == "held-out"]),
        *_samples([t for t in transcripts if t["kind"] == "training"]),
    ]
    path = workdir / "report.html"
    path.write_text(_PAGE.replace("BODY", "\n".join(body)), encoding="utf-8")
    return path


def _summary(metrics: Sequence[Mapping[str, float]]) -> str:
    last = metrics[-1]
    rows = "".join(
        f"<tr><td>{escape(name)}</td><td>{metrics[0].get(name, float('nan')):.4g}</td>"
        f"<td>{value:.4g}</td></tr>"
        for name, value in last.items()
    )
    return (
        f"<p>{len(metrics)} batches, the last is {int(last['step'])}.</p>"
        "<details><summary>All metrics, first and last batch</summary>"
        f"<table><tr><th></th><th>first</th><th>last</th></tr>{rows}</table></details>"
    )


def _chosen(
    metrics: Sequence[Mapping[str, float]], names: Sequence[str]
) -> dict[str, list[tuple[float, float]]]:
    """(step, value) of each metric that a figure shows."""
    known = dict.fromkeys(name for record in metrics for name in record)
    wanted = [
        name
        for name in known
        if any(name == n or (n.endswith("/") and name.startswith(n)) for n in names)
    ]
    return {name: [(r["step"], r[name]) for r in metrics if name in r] for name in wanted}


def figure(title: str, curves: Mapping[str, Sequence[tuple[float, float]]]) -> str:
    """Curves over the step as a figure with axes and a legend; nothing if there are none.

    Args:
      title: Of the figure.
      curves: (step, value) pairs by name; values that are not finite are left out.
    """
    finite = {
        name: [(x, y) for x, y in points if abs(y) < float("inf")]
        for name, points in curves.items()
    }
    finite = {name: points for name, points in finite.items() if points}
    if not finite:
        return ""
    xs, ys = zip(*(p for points in finite.values() for p in points), strict=True)
    left, right, low, high = min(xs), max(xs), min(0.0, *ys), max(ys)
    high = high if high > low else low + 1

    def place(x: float, y: float) -> str:
        across = (x - left) / max(right - left, 1e-9) * (_WIDTH - _LEFT - 8)
        up = (y - low) / (high - low) * (_HEIGHT - _BOTTOM - 10)
        return f"{_LEFT + across:.1f},{_HEIGHT - _BOTTOM - up:.1f}"

    parts = [_axes(left, right, low, high)]
    legend = []
    for colour, (name, points) in zip(_COLOURS * len(finite), finite.items(), strict=False):
        line = " ".join(place(x, y) for x, y in points)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}"/>')
        if len(points) < 40:
            dots = (place(x, y).split(",") for x, y in points)
            parts += [f'<circle cx="{x}" cy="{y}" r="2" fill="{colour}"/>' for x, y in dots]
        value = points[-1][1]
        legend.append(f'<span style="color:{colour}">■</span> {escape(name)} {value:.4g}')
    return (
        f'<figure><figcaption>{escape(title)}</figcaption><svg viewBox="0 0 {_WIDTH} {_HEIGHT}">'
        f"{''.join(parts)}</svg><p>{' &nbsp; '.join(legend)}</p></figure>"
    )


def _axes(left: float, right: float, low: float, high: float) -> str:
    bottom, top, end = _HEIGHT - _BOTTOM, 10, _WIDTH - 8
    labels = (
        (_LEFT - 4, bottom, "end", f"{low:.3g}"),
        (_LEFT - 4, top + 6, "end", f"{high:.3g}"),
        (_LEFT, _HEIGHT - 6, "start", f"{left:g}"),
        (end, _HEIGHT - 6, "end", f"{right:g}"),
    )
    text = "".join(
        f'<text x="{x}" y="{y}" text-anchor="{anchor}">{label}</text>'
        for x, y, anchor, label in labels
    )
    return f'<path d="M{_LEFT} {top}V{bottom}H{end}" class="axis"/>{text}'


def _before_and_after(transcripts: Sequence[Mapping[str, Any]]) -> list[str]:
    """The first and the last answer to each held-out question, those that changed first."""
    by_question: dict[str, list[Mapping[str, Any]]] = {}
    for transcript in transcripts:
        by_question.setdefault(transcript["question"], []).append(transcript)
    pairs = sorted(
        ((answers[0], answers[-1]) for answers in by_question.values()),
        key=lambda pair: pair[0]["reward"] - pair[1]["reward"],
    )
    return ["<h2>Held-out questions, before and after</h2>"] * bool(pairs) + [
        f'<section class="entry"><h3>{escape(a["task"])}: {_question(a)}</h3>'
        f'<div class="pair">{_answer(a)}{_answer(b)}</div></section>'
        for a, b in pairs
    ]


def _samples(transcripts: Sequence[Mapping[str, Any]]) -> list[str]:
    every = max(-(-len(transcripts) // _SHOWN), 1)
    return ["<h2>Samples of the training</h2>"] * bool(transcripts) + [
        f'<section class="entry"><h3>{escape(t["task"])}: {_question(t)}</h3>{_answer(t)}</section>'
        for t in transcripts[::every]
    ]


def _question(transcript: Mapping[str, Any]) -> str:
    return f"{escape(transcript['question'])} <small>→ {escape(transcript['answer'])}</small>"


def _answer(transcript: Mapping[str, Any]) -> str:
    parts = ", ".join(f"{escape(n)} {x:g}" for n, x in transcript["components"].items())
    return (
        f"<div><p>step {transcript['step']}: reward {transcript['reward']:g} ({parts}), "
        f"{transcript['tokens']} tokens, ended by {escape(transcript['ended'])}</p>"
        f"<pre>{escape(transcript['text'])}</pre></div>"
    )


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Reinforcement run</title><style>
body { font: 14px/1.4 system-ui, sans-serif; margin: 1.5rem auto; max-width: 1320px }
.figures { display: flex; flex-wrap: wrap; gap: 1rem }
figure { margin: 0; width: 420px } figcaption { font-weight: 600 } figure p { margin: 0 }
svg text { font-size: 10px; fill: #5a6b78 } .axis { stroke: #c3ccd4; fill: none }
.entry { border-top: 1px solid #dde3e8; padding: .4rem 0 }
h3 { font-size: 14px; margin: .2rem 0 }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 1rem } .entry p { margin: 0 }
pre { white-space: pre-wrap; background: #f4f6f8; padding: .5rem; margin: .2rem 0 }
#search { position: sticky; top: 0; font: inherit; width: 100%; padding: .4rem }
td { padding: 0 1rem }
</style></head><body>
<input id="search" type="search" placeholder="search questions and answers">
BODY
<script>
document.getElementById("search").addEventListener("input", event => {
  const wanted = event.target.value.toLowerCase();
  for (const entry of document.querySelectorAll(".entry"))
    entry.hidden = !entry.textContent.toLowerCase().includes(wanted);
});
</script></body></html>
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of this module."""
    parser = argparse.ArgumentParser(prog="python -m train.report", description=__doc__)
    parser.add_argument("workdir", type=Path, help="folder of a cispo job")
    args = parser.parse_args(argv)
    try:
        print(write_report(args.workdir))
    except FileNotFoundError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
