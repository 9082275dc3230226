"""`mmjax serve`: flags to a server that runs until it is told to stop."""

from __future__ import annotations

import argparse
import contextlib
import gc
import ipaddress
import logging
import os
import signal
import socket
import sys
from pathlib import Path

from mmjax.config import ConfigError
from mmjax.engine import Engine
from mmjax.engine.cli import add_placement, keep_compiled, load_to_serve
from mmjax.model import Decoder
from mmjax.serve.app import ServeConfig, create_app
from mmjax.serve.images import ImageSource
from mmjax.serve.jobs import Served
from mmjax.serve.server import HttpServer
from mmjax.tokenizer import Tokenizer

_KEY_VARIABLE = "MMJAX_API_KEY"
_MIB = 2**20


class ServeError(ConfigError):
    """Flags that cannot be served; the message says what to change."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the subcommand."""
    parser.description = (
        "Serves a model folder over HTTP, as OpenAI's API does: /v1/chat/completions, "
        "/v1/completions, /v1/models; also /health, /metrics, /openapi.json."
    )
    add = parser.add_argument
    add("path", help="model folder: safetensors (either layout) or Orbax, with its tokenizer.json")
    add("--name", help="the model's name in requests (the folder's name)")
    add("--host", default="127.0.0.1", help="address to bind (127.0.0.1: this machine only)")
    add(
        "--port",
        type=int,
        choices=range(65536),
        metavar="PORT",
        default=8000,
        help="port to bind, 0 for any free one (8000)",
    )
    add("--api-key-file", type=Path, help=f"a file with the key to ask for (or {_KEY_VARIABLE})")
    add_placement(parser)
    add("--max-slots", type=int, default=16, help="samples that run at a time (16)")
    add("--max-length", type=int, help="most tokens of prompt and completion (the engine's choice)")
    add("--num-pages", type=int, help="KV pages (the engine's choice)")
    add("--prefill-chunk", type=int, default=2048, help="prompt tokens computed at once (2048)")
    add("--max-waiting", type=_count, default=256, help="samples that may wait for a slot (256)")
    add("--max-body-mib", type=_count, default=32, help="size of a request's body (32)")
    add(
        "--allow-remote-images",
        action="store_true",
        help="fetch images that requests name by a public http(s) address",
    )
    add("--max-image-mib", type=_count, default=20, help="size of an image file (20)")
    add("--drain-seconds", type=_count, default=60, help="for running requests after SIGTERM (60)")
    add("--no-warm-up", action="store_true", help="compile when requests come, not at the start")
    add("--log-level", default="info", choices=("debug", "info", "warning", "error"))


def run(args: argparse.Namespace) -> int:
    """Runs the subcommand.

    Raises:
      ServeError: flags that cannot be.
      CheckpointError, TokenizerError, OSError: what the folder or the port lacks.
    """
    logging.basicConfig(format="%(levelname)s: %(name)s: %(message)s")
    key = _api_key(args)
    keep_compiled(args.compilation_cache)
    bound = _bind(args.host, args.port)  # A port that is taken should not cost a model's loading.
    with bound:
        if key is None and not _is_loopback(bound):
            print(
                f"mmjax serve: warning: {args.host} can be reached from other machines, and no API "
                f"key is asked for; set {_KEY_VARIABLE} or --api-key-file",
                file=sys.stderr,
            )
        server = _server(args, key, bound)
        # uvicorn raises the signal that ended it once more; after an orderly end that says nothing.
        signal.signal(signal.SIGTERM, lambda *_: None)
        server.run([bound])
    return 0


def _server(args: argparse.Namespace, key: str | None, bound: socket.socket) -> HttpServer:
    model = load_to_serve(args)
    tokenizer = Tokenizer.load(args.path)
    engine = _engine(args, model, tokenizer)
    if not args.no_warm_up:
        engine.warm_up()
    # A collection that looks through all that was compiled stops every stream for a third of a
    # second; from here on Python's collector leaves it alone.
    gc.collect()
    gc.freeze()
    name = args.name or Path(args.path).resolve().name
    config = ServeConfig(
        api_key=key, max_waiting=args.max_waiting, max_body=args.max_body_mib * _MIB
    )
    images = ImageSource(args.allow_remote_images, args.max_image_mib * _MIB)
    served = Served(name, tokenizer, engine.max_length, model.cfg.vision, images)
    app = create_app(engine, served, config)
    host, port = bound.getsockname()[:2]
    told = (
        f"mmjax serve: serving {name} at http://{f'[{host}]' if ':' in host else host}:{port}/v1 "
        f"({args.max_slots} slots, {engine.max_length} tokens)"
    )
    return HttpServer(app, told, drain=args.drain_seconds, log_level=args.log_level)


def _count(text: str) -> int:
    value = int(text)
    if value < 0:
        raise ValueError  # argparse says the rest
    return value


_count.__name__ = "count"


def _engine(args: argparse.Namespace, model: Decoder, tokenizer: Tokenizer) -> Engine:
    try:
        return Engine(
            model,
            tokenizer,
            max_slots=args.max_slots,
            max_length=args.max_length,
            num_pages=args.num_pages,
            prefill_chunk=args.prefill_chunk,
            int8_experts=args.int8_experts,
        )
    except ValueError as error:
        raise ServeError(str(error)) from None


def _api_key(args: argparse.Namespace) -> str | None:
    """From a file or the environment, never from the command line, which anyone here can list."""
    if args.api_key_file is None:
        source, key = _KEY_VARIABLE, os.environ.get(_KEY_VARIABLE)
    else:
        source, key = args.api_key_file, args.api_key_file.read_text(encoding="utf-8").strip()
    if key is not None and not (key.isascii() and key.isprintable() and key):
        raise ServeError(f"the API key in {source} must be printable ASCII, and not empty")
    return key


def _bind(host: str, port: int) -> socket.socket:
    """A socket that is bound but does not listen yet."""
    with contextlib.ExitStack() as stack:
        try:
            family, kind, protocol, _, address = socket.getaddrinfo(
                host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )[0]
            bound = stack.enter_context(socket.socket(family, kind, protocol))
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind(address)
        except OSError as error:
            told = f"cannot bind {host}:{port}: {error}; choose another --host or --port"
            raise ServeError(told) from None
        stack.pop_all()
    return bound


def _is_loopback(bound: socket.socket) -> bool:
    return ipaddress.ip_address(bound.getsockname()[0]).is_loopback
