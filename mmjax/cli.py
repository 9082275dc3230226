"""The command line: `mmjax convert`, `synth`, `generate`, `serve`, `plan`."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import jax

from kernels_pallas.dispatch import UnavailableError
from mmjax.config import ConfigError, ModelConfig
from mmjax.convert import CheckpointError, CheckpointWarning, convert
from mmjax.convert.api import LAYOUTS, preview
from mmjax.convert.native import differences
from mmjax.convert.stream import WORKERS
from mmjax.convert.synth import FILLS, preset, synthesise
from mmjax.convert.table import LAYOUTS as TENSOR_LAYOUTS
from mmjax.engine.results import RequestError
from mmjax.plan.chips import PlanError
from mmjax.sharding import ShardingError
from mmjax.tokenizer import TokenizerError

# What a user can put right; anything else is a bug and keeps its traceback.
_USER_ERRORS = (
    CheckpointError,
    ConfigError,
    PlanError,
    RequestError,
    ShardingError,
    TokenizerError,
    UnavailableError,
    OSError,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
      argv: Arguments without the program's name; None for the process's own.

    Returns:
      0, or 2 after an error that is told on stderr.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    args = _parser(argv[:1]).parse_args(argv)
    with warnings.catch_warnings():
        warnings.simplefilter("always", CheckpointWarning)
        warnings.showwarning = _show_note
        try:
            return args.run(args)
        except _USER_ERRORS as error:
            print(f"mmjax {args.command}: error: {error}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            print(f"mmjax {args.command}: interrupted", file=sys.stderr)
            return 130


def _parser(command: list[str]) -> argparse.ArgumentParser:
    """The parser; the arguments of a heavy command are added only where it is the one called."""
    parser = argparse.ArgumentParser(
        prog="mmjax",
        description="MiniMax-01 / M1 models in JAX: checkpoints, generation, serving, planning.",
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    _add_convert(
        commands.add_parser("convert", help="rewrite a model folder in another checkpoint layout")
    )
    _add_synth(
        commands.add_parser("synth", help="write a checkpoint of any size in a released structure")
    )
    generate = commands.add_parser("generate", help="continue prompts with a model folder, or chat")
    if command == ["generate"]:
        from mmjax.engine import cli as engine_cli

        engine_cli.add_arguments(generate)
        generate.set_defaults(run=engine_cli.run)
    serve = commands.add_parser("serve", help="serve a model folder over HTTP, as OpenAI's API")
    if command == ["serve"]:
        serve_cli = _import_serve(parser)
        serve_cli.add_arguments(serve)
        serve.set_defaults(run=serve_cli.run)
    plan = commands.add_parser("plan", help="what a job needs and costs on chips not yet rented")
    if command == ["plan"]:
        from mmjax.plan import cli as plan_cli

        plan_cli.add_arguments(plan)
        plan.set_defaults(run=plan_cli.run)
    return parser


def _import_serve(parser: argparse.ArgumentParser) -> ModuleType:
    try:
        from mmjax.serve import cli as serve_cli
    except ModuleNotFoundError as error:
        parser.error(f"serve needs {error.name}: pip install 'mmjax[serve]'")
    return serve_cli


def _add_convert(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Rewrites a model folder. Reads the released layout, transformers' own, and Orbax; keeps "
        "dtypes; copies tokenizer files. Holds little in memory, checks what it has written, and "
        "goes on where it was if the same command is run again after a kill."
    )
    parser.add_argument("source", metavar="SRC", help="a model folder")
    parser.add_argument("target", metavar="DST", help="a new or empty folder")
    parser.add_argument(
        "--to",
        choices=LAYOUTS,
        required=True,
        help="hf: the released layout; hf-native: transformers' own; orbax: sharded loading",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="read headers alone and say what would be done"
    )
    parser.add_argument("--workers", type=_positive, default=WORKERS, help="threads (%(default)s)")
    _add_shard_mb(parser)
    parser.set_defaults(run=_convert)


def _add_shard_mb(parser: argparse.ArgumentParser) -> None:
    told = "largest safetensors file, in MB (%(default)s)"
    parser.add_argument("--shard-mb", type=_positive, default=5000, help=told)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def _add_synth(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Writes a model folder with the names, shapes and dtypes of a released model, or of one "
        "with fewer layers, experts or tokens, and with made-up numbers: to try conversion, "
        "loading and disks at size."
    )
    add = parser.add_argument
    add("target", metavar="DST", help="a new or empty folder")
    presets = ("minimax_m1", "minimax_text_01", "minimax_vl_01")
    add("--preset", choices=presets, default=presets[0], help="the model (%(default)s)")
    add("--layers", type=_positive, help="layers (all)")
    add("--experts", type=_positive, help="experts of a layer (all)")
    add("--vocab", type=_positive, help="tokens (all)")
    add("--fill", choices=FILLS, default="random", help="zeros: files with holes (%(default)s)")
    add("--to", choices=TENSOR_LAYOUTS, default="hf", help="layout (%(default)s)")
    _add_shard_mb(parser)
    parser.set_defaults(run=_synth)


def _synth(args: argparse.Namespace) -> int:
    jax.config.update("jax_platforms", "cpu")
    cfg = preset(args.preset, layers=args.layers, experts=args.experts, vocab=args.vocab)
    synthesise(cfg, args.target, args.to, fill=args.fill, shard_bytes=args.shard_mb * 10**6)
    print(f"wrote {args.target}")
    return 0


def _convert(args: argparse.Namespace) -> int:
    # Conversion runs on the host; it should not take an accelerator's memory.
    jax.config.update("jax_platforms", "cpu")
    how = {"shard_bytes": args.shard_mb * 10**6, "workers": args.workers}
    if args.dry_run:
        print(preview(args.source, args.target, args.to, **how))
        print("dry run: nothing was written")
        return 0
    done = convert(args.source, args.target, args.to, **how)
    if args.to == "hf-native":
        for note in differences(ModelConfig.from_hf(args.target)):
            print(f"mmjax convert: note: {note}", file=sys.stderr)
    print(
        f"wrote {args.target}: {done.written / 1e9:.2f} of {done.size / 1e9:.2f} GB, all read back "
        f"and checked, in {done.seconds:.1f} s"
    )
    return 0


def _show_note(message: Warning | str, *_: Any, **__: Any) -> None:
    print(f"mmjax: note: {message}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
