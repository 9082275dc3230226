"""`mmjax generate`: prompts to completions at the terminal, or a chat."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache

from mmjax.chat import THINK_END, render_chat, split_thinking
from mmjax.config import ConfigError
from mmjax.convert import load
from mmjax.engine.engine import Engine, Prompt
from mmjax.engine.images import ImagePrompt
from mmjax.engine.results import Output, RequestError
from mmjax.engine.sampling import SamplingParams
from mmjax.model import Decoder
from mmjax.sharding import SERVING_RULES, make_mesh, parse_mesh
from mmjax.tokenizer import Tokenizer
from mmjax.vision import Image, ImageError, image_tokens, read_image

# Prompts that run side by side, and the longest chat unless told otherwise.
SLOTS, CHAT_LENGTH = 16, 32768


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the subcommand."""
    parser.add_argument("path", help="model folder: safetensors (either layout) or Orbax")
    parser.add_argument("--prompt", action="append", help="a prompt; may be given several times")
    parser.add_argument("--prompts-file", help="a file with one prompt a line, - for stdin")
    parser.add_argument(
        "--image", action="append", default=[], help="a picture for the prompt; several in order"
    )
    parser.add_argument("--chat", action="store_true", help="chat (as without prompts on a tty)")
    parser.add_argument("--raw", action="store_true", help="no chat template around the prompt")
    parser.add_argument("--system", help="the system message")
    parser.add_argument("--max-tokens", type=int, default=256, help="most new tokens (256)")
    parser.add_argument("--temperature", type=float, default=1.0, help="0 is greedy (1.0)")
    parser.add_argument("--top-p", type=float, default=0.95, help="nucleus mass (0.95)")
    parser.add_argument("--top-k", type=int, default=0, help="candidates kept, 0 for all (0)")
    parser.add_argument("--min-p", type=float, default=0.0, help="least share of the likeliest (0)")
    parser.add_argument("--stop", action="append", default=[], help="a text that ends the answer")
    parser.add_argument("--thinking-budget", type=int, help="tokens after which thinking is closed")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling (0)")
    parser.add_argument("--max-length", type=int, help="most tokens of a chat (32768)")
    add_placement(parser)


def add_placement(parser: argparse.ArgumentParser) -> None:
    """Flags that `load_to_serve` and `keep_compiled` read beside `path`."""
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="override the weights'")
    parser.add_argument(
        "--int8-experts", action="store_true", help="keep the experts in int8: half the memory"
    )
    parser.add_argument("--mesh", help="expert=4,model=2: over which axes the devices lie (one)")
    parser.add_argument(
        "--compilation-cache",
        type=Path,
        metavar="DIR",
        help="a folder that keeps compiled programs, so that the next start compiles none of them",
    )


def keep_compiled(folder: Path | None) -> None:
    """Lets JAX keep every program that it compiles in a folder; None changes nothing.

    Raises:
      ConfigError: a folder that cannot be written; JAX itself would go on without it.
    """
    if folder is None:
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ConfigError(
            f"--compilation-cache {folder} cannot be written: {error}; name another folder"
        ) from None
    jax.config.update("jax_compilation_cache_dir", str(folder))
    # By default what compiles within a second would be compiled anew at every start.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    compilation_cache.reset_cache()  # JAX looks at the folder once, and may have done so before.


def load_to_serve(args: argparse.Namespace) -> Decoder:
    """The model of a command line, on its mesh as an engine keeps it.

    Raises:
      ConfigError, CheckpointError: the folder cannot be loaded.
      ShardingError: the mesh fits the devices or the model not.
    """
    if args.mesh is None:
        return load(args.path, dtype=args.dtype)
    mesh = make_mesh(parse_mesh(args.mesh))
    return load(args.path, mesh=mesh, rules=SERVING_RULES, dtype=args.dtype)


def run(args: argparse.Namespace) -> int:
    """Runs the subcommand.

    Raises:
      RequestError: no prompt, one that is too long, or a sampling parameter out of its range.
    """
    keep_compiled(args.compilation_cache)
    texts = _prompts(args)
    images = _images(args, texts)
    params = _params(args)
    tokenizer = Tokenizer.load(args.path)
    model = load_to_serve(args)
    if texts is None:
        length = args.max_length or CHAT_LENGTH
        engine = Engine(
            model, tokenizer, max_slots=1, max_length=length, int8_experts=args.int8_experts
        )
        _chat(engine, tokenizer, params, args)
        return 0
    encoded = [tokenizer.encode(_rendered(text, tokenizer, args)) for text in texts]
    prompts: list[Prompt] = [*encoded]
    more = 0
    if images:
        if model.cfg.vision is None:
            raise RequestError(f"the model in {args.path} takes no images; leave out --image")
        more = sum(image_tokens(image.size, model.cfg.vision) for image in images)
        prompts = [ImagePrompt(encoded[0], images)]
    longest = args.max_length or max(map(len, encoded)) + more + params.max_tokens
    slots = min(len(prompts), SLOTS)
    engine = Engine(
        model,
        tokenizer,
        max_slots=slots,
        max_length=longest,
        num_prefixes=slots,
        int8_experts=args.int8_experts,
    )
    _print_all(engine, texts, prompts, params)
    return 0


class _Meter:
    """Counts tokens and the time that they take, those of the first round apart."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._first: float | None = None
        self._count = self._after = 0

    def watch(self, outputs: list[Output]) -> list[Output]:
        """Passes on what came at one time."""
        count = sum(len(output.token_ids) for output in outputs)
        if self._first is not None:
            self._after += count
        elif count:
            self._first = time.perf_counter()
        self._count += count
        return outputs

    def __str__(self) -> str:
        now = time.perf_counter()
        first = (self._first or now) - self._start
        rest = now - self._start - first
        rate = f", then {self._after / rest:.0f} tokens/s" if self._after else ""
        return f"{self._count} tokens, the first after {first:.2f} s{rate}; compilation included"


def _print_all(
    engine: Engine, texts: list[str], prompts: list[Prompt], params: SamplingParams
) -> None:
    """Runs all prompts; shows the first that is not done as it comes, the others after it."""
    meter = _Meter()
    names = [engine.add(prompt, params) for prompt in prompts]
    pending, done = dict.fromkeys(names, ""), set()
    print(f"--- {texts[0]}")
    while pending:
        for output in meter.watch(engine.step()):
            pending[output.request_id] += output.text
            if output.finish_reason is not None:
                done.add(output.request_id)
        while pending:
            name = next(iter(pending))
            print(pending[name], end="", flush=True)
            pending[name] = ""
            if name not in done:
                break
            del pending[name]
            following = names.index(name) + 1
            print(f"\n--- {texts[following]}" if pending else "", flush=True)
    print(meter, file=sys.stderr)


def _chat(
    engine: Engine, tokenizer: Tokenizer, params: SamplingParams, args: argparse.Namespace
) -> None:
    """Turns until the end of the input; an interrupt ends the answer, not the chat."""
    messages = _messages(args)
    print("Say something; Ctrl-D leaves.", file=sys.stderr)
    while True:
        try:
            text = input("> ")
        except EOFError:
            print(file=sys.stderr)
            return
        if not text.strip():
            continue
        messages.append({"role": "user", "content": text})
        answer, meter = "", _Meter()
        try:
            for output in engine.stream(_render(messages, tokenizer), params):
                meter.watch([output])
                answer += output.text
                print(output.text, end="", flush=True)
            print()
        except KeyboardInterrupt:
            print(" …")
        except RequestError as error:
            print(f"{error}; the chat begins anew", file=sys.stderr)
            messages = _messages(args)
            continue
        print(meter, file=sys.stderr)
        # As the models were trained, earlier thinking is not shown to them again.
        kept = split_thinking(answer)[1] if THINK_END in answer else answer
        messages.append({"role": "assistant", "content": kept})


def _messages(args: argparse.Namespace) -> list[dict[str, Any]]:
    return [{"role": "system", "content": args.system}] if args.system else []


def _rendered(text: str, tokenizer: Tokenizer, args: argparse.Namespace) -> str:
    if args.raw:
        return text
    content = [*({"type": "image"} for _ in args.image), {"type": "text", "text": text}]
    return _render([*_messages(args), {"role": "user", "content": content}], tokenizer)


def _render(messages: list[dict[str, Any]], tokenizer: Tokenizer) -> str:
    return render_chat(messages, document_start=tokenizer.document_start)


def _images(args: argparse.Namespace, texts: list[str] | None) -> list[Image]:
    if args.image and (texts is None or len(texts) != 1):
        raise RequestError("--image goes with one --prompt")
    try:
        return [read_image(path) for path in args.image]
    except ImageError as error:
        raise RequestError(str(error)) from None


def _params(args: argparse.Namespace) -> SamplingParams:
    try:
        return SamplingParams(
            args.max_tokens,
            args.temperature,
            args.top_p,
            args.top_k,
            min_p=args.min_p,
            seed=args.seed,
            stop=tuple(args.stop),
            thinking_budget=args.thinking_budget,
        )
    except ValueError as error:
        raise RequestError(str(error)) from None


def _prompts(args: argparse.Namespace) -> list[str] | None:
    """The prompts; None for a chat."""
    texts = list(args.prompt or [])
    if args.prompts_file:
        try:
            if args.prompts_file == "-":
                text = sys.stdin.read()
            else:
                text = Path(args.prompts_file).read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise RequestError(
                f"--prompts-file {args.prompts_file} is not UTF-8 at byte {error.start}; convert it"
            ) from None
        texts += [line for line in text.split("\n") if line.strip()]
    if args.chat or (not texts and not args.prompts_file and sys.stdin.isatty()):
        if texts:
            raise RequestError("--chat takes its prompts from the terminal; leave out the others")
        return None
    if not texts:
        raise RequestError("no prompt: give --prompt TEXT, --prompts-file FILE or --chat")
    return texts
