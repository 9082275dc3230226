"""`mmjax generate`: prompts to completions at the terminal."""

from __future__ import annotations

import argparse
import sys
import time

import jax
import numpy as np

from mmjax.chat import render_chat
from mmjax.convert import load
from mmjax.engine.generate import PromptError, generate, pad_prompts
from mmjax.engine.sampling import SamplingParams
from mmjax.tokenizer import Tokenizer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the subcommand."""
    parser.add_argument("path", help="model folder: safetensors (either layout) or Orbax")
    parser.add_argument("--prompt", action="append", help="a prompt; may be given several times")
    parser.add_argument("--prompts-file", help="a file with one prompt a line, - for stdin")
    parser.add_argument("--raw", action="store_true", help="no chat template around the prompt")
    parser.add_argument("--max-tokens", type=int, default=256, help="most new tokens (256)")
    parser.add_argument("--temperature", type=float, default=1.0, help="0 is greedy (1.0)")
    parser.add_argument("--top-p", type=float, default=0.95, help="nucleus mass (0.95)")
    parser.add_argument("--top-k", type=int, default=0, help="candidates kept, 0 for all (0)")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling (0)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="override the weights'")


def run(args: argparse.Namespace) -> int:
    """Runs the subcommand.

    Raises:
      PromptError: no prompt, or one that is too long.
    """
    texts = _prompts(args)
    model = load(args.path, dtype=args.dtype)
    tokenizer = Tokenizer.load(args.path)
    rendered = [t if args.raw else render_chat([{"role": "user", "content": t}]) for t in texts]
    params = SamplingParams(
        args.max_tokens, args.temperature, args.top_p, args.top_k, tokenizer.eos_id
    )
    tokens, lengths = pad_prompts([tokenizer.encode(t) for t in rendered])
    start = time.perf_counter()
    out = jax.device_get(generate(model, tokens, lengths, params, jax.random.key(args.seed)))
    seconds = time.perf_counter() - start
    for row, text in enumerate(texts):
        ids = out.tokens[row, : out.length[row]].tolist()
        if out.finished[row]:
            ids = ids[:-1]  # the end token says nothing to a reader, the thinking marks do
        print(f"--- {text}\n{tokenizer.decode(ids)}")
    count = int(np.sum(out.length))
    print(
        f"{count} tokens in {seconds:.2f} s, compilation included ({count / seconds:.0f} tokens/s)",
        file=sys.stderr,
    )
    return 0


def _prompts(args: argparse.Namespace) -> list[str]:
    texts = list(args.prompt or [])
    if args.prompts_file:
        if args.prompts_file == "-":
            lines = sys.stdin.read().splitlines()
        else:
            with open(args.prompts_file, encoding="utf-8") as file:
                lines = file.read().splitlines()
        texts += [line for line in lines if line.strip()]
    if not texts:
        raise PromptError("no prompt: give --prompt TEXT or --prompts-file FILE")
    return texts
