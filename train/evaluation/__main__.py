"""`python -m train.evaluation`: a model folder or workdir, asked by hand; or results, drawn.

python -m train.evaluation --model runs/x --task "niah(keys=4)" --lengths 1024,4096
python -m train.evaluation --draw docs/images/recall.png hybrid=a.json softmax=b.json
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np
from flax import nnx
from rich.console import Console
from rich.table import Table

import mmjax
from mmjax.config import ConfigError
from mmjax.model import Decoder
from mmjax.sharding import make_mesh
from mmjax.tokenizer import Tokenizer
from train.config import EvaluationConfig, check_evaluation
from train.errors import USER_ERRORS
from train.evaluation.loop import Result, evaluate, tables, write
from train.evaluation.scoring import Scorer, generated_hits
from train.evaluation.suite import Suite

_TASKS = (
    *("niah", "niah(keys=4)", "niah(haystack='needles')", "niah(keys=4, values=4)"),
    *("niah(keys=4, queries=4)", "variable_tracking", "common_words", "frequent_words"),
    "multi_round",
)


def main(argv: list[str] | None = None) -> int:
    """Command line of this module; an error that the user can mend ends in one message."""
    args = _parser().parse_args(argv)
    try:
        if args.draw:
            return _draw(args)
        if not args.model:
            raise ConfigError("--model names the folder to evaluate, or --draw a picture to make")
        return _evaluate(args)
    except USER_ERRORS as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m train.evaluation", description="Evaluate a model, or draw results."
    )
    parser.add_argument("--model", type=Path, help="model folder, or workdir of a job")
    parser.add_argument("--task", action="append", help="docs/evaluation.md has them; several")
    parser.add_argument("--lengths", default="1024,2048,4096", help="tokens (1024,2048,4096)")
    parser.add_argument("--depths", type=int, default=5, help="depths of the needle (5)")
    parser.add_argument("--samples", type=int, default=10, help="samples a length and depth (10)")
    parser.add_argument("--text", action="append", default=[], help="files for the perplexity")
    parser.add_argument("--rows", type=int, default=64, help="stretches of them (64)")
    parser.add_argument("--plain", action="store_true", help="prompts without M1's chat form")
    parser.add_argument("--generate", action="store_true", help="let the engine write answers")
    parser.add_argument("--tokens", type=int, default=32768, help="computed at a time (32768)")
    parser.add_argument("--dtype", help="of parameters and activations, such as bfloat16")
    parser.add_argument("--out", type=Path, default=Path("runs/evaluation"), help="folder")
    parser.add_argument("--draw", type=Path, help="picture to make of NAME=result.json arguments")
    parser.add_argument("--trained", type=int, default=0, help="length to mark in the picture")
    parser.add_argument("results", nargs="*", help="for --draw: NAME=result.json")
    return parser


def _evaluate(args: argparse.Namespace) -> int:
    cfg = EvaluationConfig(
        tasks=tuple(args.task if args.task is not None else () if args.text else _TASKS),
        lengths=_lengths(args.lengths),
        depths=args.depths,
        samples=args.samples,
        paths=tuple(args.text),
        rows=args.rows,
    )
    problems = check_evaluation(cfg)
    if problems:
        raise ConfigError("; ".join(problems))
    folder = _model_folder(args.model)
    tokenizer = Tokenizer.load(folder)
    suite = Suite(cfg, tokenizer, chat=not args.plain)
    if args.generate:
        result = _generated(suite, mmjax.load(folder, dtype=args.dtype), tokenizer)
    else:
        mesh = make_mesh()
        graphdef, params = nnx.split(mmjax.load(folder, mesh=mesh, dtype=args.dtype))
        result = evaluate(suite, Scorer(graphdef, mesh), params, args.tokens)
    write(result, args.out, "result")
    _show(result)
    print(f"result and heat map in {args.out}")
    return 0


def _model_folder(path: Path) -> Path:
    """Itself, or the model that a job exported to its workdir."""
    if not (path / "checkpoints").is_dir():
        return path
    if not (path / "model").is_dir():
        raise ConfigError(
            f"{path} is the workdir of a job that has exported no model; run the job's command "
            "again with --config.checkpoint.export=hf"
        )
    return path / "model"


def _generated(suite: Suite, model: Decoder, tokenizer: Tokenizer) -> Result:
    shares = []
    for cell in suite.cells:
        hits = generated_hits(
            model,
            tokenizer,
            [prompt for prompt, _ in cell.pairs],
            [sample.values for sample in cell.samples],
            answer_tokens=max(len(answer) for _, answer in cell.pairs),
            slots=16,
        )
        shares.append(float(np.mean(hits)))
    return {"tasks": tables(suite, shares)}


def _lengths(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(f"--lengths {text!r} is no list of numbers such as 1024,4096") from None


def _show(result: Result) -> None:
    console = Console()
    for task, table in result["tasks"].items():
        view = Table("depth", *map(str, table["lengths"]), title=task)
        for depth, row in zip(table["depths"], table["accuracy"], strict=True):
            name = "any" if depth is None else f"{depth:.0%}"
            view.add_row(name, *(f"{share:.2f}" for share in row))
        view.add_row("mean", *(f"{m:.2f}" for m in np.mean(table["accuracy"], axis=0)))
        console.print(view)
    if "text" in result:
        text = result["text"]
        view = Table("position", "tokens", "loss", "perplexity")
        for part in text["by_position"]:
            view.add_row(
                f"{part['from']}-{part['to']}",
                *(str(part["tokens"]), f"{part['loss']:.4f}", f"{part['perplexity']:.3f}"),
            )
        view.add_row("all", "", f"{text['loss']:.4f}", f"{text['perplexity']:.3f}")
        console.print(view)


def _draw(args: argparse.Namespace) -> int:
    from train.evaluation.heatmap import draw

    results = {}
    for item in args.results:
        name, _, file = item.rpartition("=")
        try:
            results[name or Path(file).stem] = json.loads(Path(file).read_text())
        except (OSError, ValueError) as error:
            raise ConfigError(f"{file} is no result of an evaluation: {error}") from None
    if not results:
        raise ConfigError("--draw needs results: NAME=evaluation/step_00001000.json")
    draw(results, args.draw, trained=args.trained)
    return 0


if __name__ == "__main__":
    sys.exit(main())
