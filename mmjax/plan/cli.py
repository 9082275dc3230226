"""`mmjax plan`: flags to a plan, told as tables or as JSON."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.table import Table

from mmjax.config import ModelConfig
from mmjax.plan import curve
from mmjax.plan.ahead import Compiled, compile_ahead, find_compiler
from mmjax.plan.chips import CHIPS, GIB, Number, PlanError, Topology, parse_topology
from mmjax.plan.counts import active_parameters
from mmjax.plan.estimate import (
    Bill,
    Estimate,
    Reinforcement,
    best_meshes,
    bill,
    estimate,
    generation,
    show_mesh,
)
from mmjax.plan.job import JOBS, Job, Request, read_request
from mmjax.sharding import parse_mesh

# Rows and tokens of a row where neither flags nor config say.
_DEFAULT_BATCH = {"prefill": 32, "decode": 256}
_DEFAULT_LENGTH = 8192


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the subcommand."""
    parser.description = (
        "Says what one step of a job needs and costs on chips that are not here: memory, FLOPs, "
        "bytes, the roofline, throughput, price. `mmjax plan flops` compares generation FLOPs of "
        "MiniMax-M1 and DeepSeek-R1."
    )
    add = parser.add_argument
    add("what", nargs="?", choices=("flops",), help="flops: M1 beside R1 against length")
    add("--config", help="configs/NAME.py[:STAGE], a model folder, or a preset (minimax_m1, …)")
    add("--topology", help=f"CHIP:SHAPE, such as v5p:8x8x8 or h200:64; chips: {', '.join(CHIPS)}")
    add("--mesh", help="data=16,expert=32 (one may be -1), or auto (the config's, else auto)")
    add("--job", choices=JOBS, default="train", help="what a step does (train)")
    add("--batch", type=int, help="rows (train: the config's, else one a device)")
    add("--length", type=int, help="tokens of a row: trained, prefilled, or behind a decoded one")
    add(
        "--remat",
        help="what a train step recomputes: super_block, layer, products, none (the config's)",
    )
    add("--moments", default="", help="dtype of AdamW's moments (the parameters')")
    add(
        "--compile",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="compile the step for the topology (on for TPUs where libtpu is installed)",
    )
    add("--tokens", type=float, help="price this many tokens")
    add("--rl", metavar="STEPSxROWSxTOKENS", help="price an RL job, such as 1000x8192x40000")
    add("--price", type=float, help="of one chip-hour, in any currency")
    add("--out", type=Path, help="flops: write the figure here, as SVG")
    add("--json", action="store_true", help="one JSON object instead of tables")


def run(args: argparse.Namespace) -> int:
    """Runs the subcommand.

    Raises:
      PlanError, ConfigError, ShardingError: what the flags ask for cannot be, or does not fit.
    """
    # Nothing is computed here; a plan should not take an accelerator.
    jax.config.update("jax_platforms", "cpu")
    if args.what == "flops":
        return _flops(args)
    if not args.config or not args.topology:
        raise PlanError("name a model and chips: --config configs/NAME.py --topology v5p:8x8x8")
    topology = parse_topology(args.topology)
    request = read_request(args.config)
    job = _job(args, request, topology)
    found = _estimates(args, request, job, topology)
    chosen = found[0]
    bills = _bills(args, chosen)
    console = Console()
    if not args.json:
        _show(console, chosen, found, bills)  # The compiler takes minutes; what is counted is here.
    compiled = _compiled(args, chosen) if chosen.fits or args.compile else None
    if args.json:
        print(json.dumps(_as_json(chosen, found, bills, compiled), indent=2))
    elif compiled is not None:
        console.print(_compiled_table(chosen.topology, compiled))
    _refuse_misfit(chosen, compiled)
    return 0


def _job(args: argparse.Namespace, request: Request, topology: Topology) -> Job:
    train = args.job == "train"
    batch = args.batch or (request.batch if train else None)
    length = args.length or (request.length if train else None)
    return Job(
        args.job,
        request.model,
        batch or _DEFAULT_BATCH.get(args.job, topology.devices),
        length or _DEFAULT_LENGTH,
        args.remat or request.remat,
        args.moments,
        request.sharding,
    )


def _estimates(
    args: argparse.Namespace, request: Request, job: Job, topology: Topology
) -> list[Estimate]:
    """The chosen mesh's estimate, or the best meshes'."""
    if args.mesh and args.mesh != "auto":
        return [estimate(job, topology, parse_mesh(args.mesh))]
    # A config's mesh is for its own train step.
    if request.mesh and not args.mesh and job.kind == "train":
        return [estimate(job, topology, request.mesh)]
    return best_meshes(job, topology)


def _bills(args: argparse.Namespace, chosen: Estimate) -> dict[str, Bill]:
    """Hours and cost of each part of the budget that was asked for, at the roofline's pace."""
    topology, bills = chosen.topology, {}
    if args.tokens:
        seconds = args.tokens / chosen.tokens_per_second
        bills[f"{args.tokens:.4g} tokens"] = bill(topology, seconds, args.price)
    if args.rl:
        budget = _parse_rl(args.rl)
        if chosen.job.kind != "train":
            raise PlanError("--rl prices generation and training; it needs --job train")
        decode = generation(chosen.job.model, budget, topology)
        seconds = budget.total / decode.tokens_per_second
        where = f"{decode.job.batch} rows on {show_mesh(decode.mesh)}"
        bills[f"RL generation, {where}"] = bill(topology, seconds, args.price)
        seconds = budget.total / chosen.tokens_per_second
        bills["RL training"] = bill(topology, seconds, args.price)
    return bills


def _parse_rl(text: str) -> Reinforcement:
    parts = text.split("x")
    if len(parts) != 3 or not all(p.isdecimal() and int(p) for p in parts):
        raise PlanError(f"--rl {text!r} is no STEPSxROWSxTOKENS, such as 1000x8192x40000")
    return Reinforcement(*map(int, parts))


def _compiled(args: argparse.Namespace, chosen: Estimate) -> Compiled | None:
    wanted = args.compile
    if wanted is None:
        wanted = chosen.topology.chip.is_tpu and find_compiler() is not None
        if chosen.topology.chip.is_tpu and not wanted:
            print("mmjax plan: note: no libtpu here, so nothing is compiled", file=sys.stderr)
    if not wanted:
        return None
    console = Console(stderr=True)
    start = time.monotonic()
    with console.status("compile ahead") as status:

        def report(stage: str) -> None:
            status.update(f"{stage} for {chosen.topology.name}, {time.monotonic() - start:.0f} s")

        return compile_ahead(chosen.job, chosen.topology, chosen.mesh, report)


def _refuse_misfit(chosen: Estimate, compiled: Compiled | None) -> None:
    peak = compiled.peak if compiled else chosen.peak
    chip = chosen.topology.chip
    if peak > chip.hbm:
        how = "compiled" if compiled else "counted"
        raise PlanError(
            f"does not fit: {_gib(peak)} a device ({how}), {chip.name} has {_gib(chip.hbm)}; take "
            "more chips, a smaller batch, or --mesh auto"
        )


def _show(
    console: Console,
    chosen: Estimate,
    found: list[Estimate],
    bills: Mapping[str, Bill],
) -> None:
    job, topology = chosen.job, chosen.topology
    total, active, inner = active_parameters(job.model)
    console.print(
        f"{job.kind}: {job.batch:,} rows of {job.length:,} tokens on {topology.name}, "
        f"{topology.chips:,} chips, mesh {show_mesh(chosen.mesh)}\n"
        f"{total / 1e9:.2f}B parameters, {active / 1e9:.2f}B active, {inner / 1e9:.2f}B of them "
        "without embedding and head",
        highlight=False,
        soft_wrap=True,
    )
    if len(found) > 1:
        console.print(_mesh_table(found))
    console.print(_memory_table(chosen))
    console.print(_roofline_table(chosen))
    for line in _summary(chosen):
        console.print(line, highlight=False, soft_wrap=True)
    if bills:
        console.print(_bill_table(bills))


def _mesh_table(found: list[Estimate]) -> Table:
    table = Table(title="best meshes, by counting")
    table.add_column("mesh", overflow="fold", min_width=26)
    for name in ("GiB", "step ≥", "tokens/s ≤", "MFU ≤", "binds"):
        table.add_column(name)
    for e in found:
        fits = "" if e.fits else " (too much)"
        row = [show_mesh(e.mesh), f"{e.peak / GIB:.1f}{fits}", _time(e.bound)]
        table.add_row(*row, f"{e.tokens_per_second:,.0f}", f"{e.mfu:.1%}", e.binds)
    return table


def _memory_table(chosen: Estimate) -> Table:
    table = Table("on one device", "GiB", title="memory")
    for name, size in chosen.memory.items():
        table.add_row(name, f"{size / GIB:.2f}")
    table.add_row("peak, counted", f"{chosen.peak / GIB:.2f}", end_section=True)
    table.add_row("capacity", f"{chosen.topology.chip.hbm / GIB:.2f}")
    return table


def _compiled_table(topology: Topology, compiled: Compiled) -> Table:
    table = Table("on one device", "GiB", title=f"compiled for {topology.name}")
    for name in ("arguments", "temporaries", "results", "program"):
        table.add_row(name, f"{getattr(compiled, name) / GIB:.2f}")
    table.add_row("peak, compiled", f"{compiled.peak / GIB:.2f}", end_section=True)
    table.add_row("capacity", f"{topology.chip.hbm / GIB:.2f}")
    seconds = ", ".join(f"{stage} {spent:.0f} s" for stage, spent in compiled.seconds.items())
    kernels = ", ".join(f"{count} × {name}" for name, count in compiled.kernels.items())
    table.caption = f"{seconds}; kernels: {kernels or 'none'}"
    return table


def _roofline_table(chosen: Estimate) -> Table:
    table = Table("one step, one device", "amount", "seconds", title="roofline")
    chip, seconds = chosen.topology.chip, chosen.seconds
    compute = f"{chosen.flops / 1e12:,.2f} TFLOP at {chip.flops / 1e12:,.0f} T/s"
    table.add_row("compute", compute, f"{seconds['compute']:.4f}")
    moved = f"{chosen.hbm_bytes / 1e9:,.2f} GB at {chip.hbm_rate / 1e9:,.0f} GB/s"
    table.add_row("HBM", moved, f"{seconds['HBM']:.4f}", end_section=True)
    for c, spent in chosen.collectives:
        name = f"{c.kind} {c.name} over {'·'.join(c.axes)}"
        table.add_row(name, f"{c.size / 1e9:,.2f} GB", f"{spent:.4f}")
    table.add_row("network", "", f"{seconds['network']:.4f}")
    return table


def _summary(chosen: Estimate) -> list[str]:
    spent = chosen.flops * chosen.topology.devices
    exact = sum(
        w.forward * w.passes + w.backward * (chosen.job.kind == "train")
        for w in chosen.work
        if w.exact
    )
    share = exact / chosen.topology.chip.exact_flops / chosen.seconds["compute"]
    return [
        f"model FLOPs {chosen.flops_model:.4g}, spent {spent:.4g} "
        f"({spent / chosen.flops_model:.2f}×, recomputing and whole blocks included)",
        f"products in float32: {share:.0%} of the compute time",
        f"step between {_time(chosen.bound)} (all overlaps) and {_time(chosen.serial)} (nothing "
        f"does); {chosen.binds} binds; MFU ≤ {chosen.mfu:.1%}; "
        f"≤ {chosen.tokens_per_second:,.0f} tokens/s",
    ]


def _bill_table(bills: Mapping[str, Bill]) -> Table:
    table = Table("budget", "hours", "chip-hours", "cost", title="at the roofline's pace")
    for name, b in bills.items():
        cost = "–" if b.cost is None else f"{b.cost:,.0f}"
        table.add_row(name, f"{b.hours:,.1f}", f"{b.chip_hours:,.0f}", cost)
    return table


def _as_json(
    chosen: Estimate,
    found: list[Estimate],
    bills: Mapping[str, Bill],
    compiled: Compiled | None,
) -> dict[str, Any]:
    job, topology = chosen.job, chosen.topology
    total, active, inner = active_parameters(job.model)
    told: dict[str, Any] = {
        "job": {"kind": job.kind, "batch": job.batch, "length": job.length, "remat": job.remat},
        "topology": {
            "name": topology.name,
            "chips": topology.chips,
            "devices": topology.devices,
            "hbm_bytes": topology.chip.hbm,
        },
        "parameters": {"total": total, "active": active, "active_without_ends": inner},
        **_estimate_json(chosen),
        "memory_bytes": dict(chosen.memory),
        "flops_model": chosen.flops_model,
        "flops_spent_per_device": chosen.flops,
        "hbm_bytes_per_device": chosen.hbm_bytes,
        "collectives": [{**c._asdict(), "seconds": seconds} for c, seconds in chosen.collectives],
        "best_meshes": [_estimate_json(e) for e in found],
    }
    if bills:
        told["bills"] = {k: {**dataclasses.asdict(b), "cost": b.cost} for k, b in bills.items()}
    if compiled is not None:
        told["compiled"] = {**dataclasses.asdict(compiled), "peak_bytes": compiled.peak}
    return told


def _estimate_json(e: Estimate) -> dict[str, Any]:
    return {
        "mesh": dict(e.mesh),
        "peak_bytes": e.peak,
        "fits": e.fits,
        "seconds": dict(e.seconds),
        "step_seconds": {"overlapped": e.bound, "serial": e.serial},
        "binds": e.binds,
        "mfu_bound": e.mfu,
        "tokens_per_second_bound": e.tokens_per_second,
    }


def _flops(args: argparse.Namespace) -> int:
    cfg = read_request(args.config).model if args.config else ModelConfig.minimax_m1()
    rows = curve.compare(cfg)
    if args.out is not None:
        args.out.write_text(curve.draw(cfg))
    if args.json:
        told = {"rows": [dataclasses.asdict(r) for r in rows], "note": curve.conclusion(cfg)}
        print(json.dumps(told, indent=2))
        return 0
    console = Console()
    table = Table("tokens", "M1", "R1, expanded", "R1, absorbed", title="FLOPs of a generation")
    for name in ("M1/R1 expanded", "its last token", "M1/R1 absorbed"):
        table.add_column(name)
    for r in rows:
        flops = (f"{f:.3g}" for f in (r.ours, r.expanded, r.absorbed))
        shares = (f"{s:.1%}" for s in (r.share, r.share_last_token, r.share_absorbed))
        table.add_row(f"{r.length:,}", *flops, *shares)
    console.print(table)
    console.print(curve.conclusion(cfg), highlight=False, soft_wrap=True)
    if args.out is not None:
        console.print(f"wrote {args.out}", highlight=False)
    return 0


def _gib(size: Number) -> str:
    return f"{size / GIB:.2f} GiB"


def _time(seconds: Number) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.2f} ms"
