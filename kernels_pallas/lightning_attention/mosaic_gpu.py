"""Lightning attention on Hopper, in Pallas on Mosaic GPU: one kernel for all four passes.

The kernel computes, for chunks of C tokens entered with state S (weights as in `clock.py`),

    o = ((q kᵀ) ∘ within) v + entering ∘ (q S)        S' = keep S + kᵀ (leaving ∘ v)

in one pass over q, k, v. The backward needs nothing else, because

    dq = L(do, v, k; S₀ᵀ)       dk = Lʳ(v, do, q; dSᵀ)       dv = Lʳ(k, q, do; dS)

with L the forward map and Lʳ the same map run from the last token to the first. No state is
stored for any chunk; the residuals are the inputs.

A block of threads serves one head, `Blocks.value` columns of v and one stretch of the sequence;
the blocks of one head form a cluster, to which q and k are sent together. One warp group computes
the outputs, one carries S in registers and hands the first a copy of it through shared memory, and
one keeps TMA loads in flight. Where rows and heads alone would leave multiprocessors idle, the
sequence is split: a first kernel computes the state that each piece adds, one pass over those
states combines them, and the main kernel starts every stretch from its own state.

Tensor cores multiply bf16. A float32 array is carried as three bf16 arrays that sum to it, and a
product of two such sums keeps the six pairs above 2⁻²⁴: true float32, at a sixth of the speed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.hopper import COLUMN, LOG2E, MATRIX, ROW, Ref, tiled
from kernels_pallas.lightning_attention.clock import Clock, read_clock
from kernels_pallas.lightning_attention.vjp import Arguments, Cotangents, keep_inputs, of_inputs

type Barriers = Any
type _Shaped = jax.Array | jax.ShapeDtypeStruct

# Columns of bf16 in a tile of shared memory.
_LANES = 64
# A multiprocessor has 512 registers for each thread of a warp group, in steps of 8.
_LOADER_REGISTERS = 24
_WORKER_REGISTERS = (512 - _LOADER_REGISTERS) // 2 // 8 * 8
_PARAMS = plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane)


class Blocks(NamedTuple):
    """How the work is cut.

    chunk: tokens a chunk. value: columns of v a block of threads. stages: chunks in flight.
    stretches: parts of the sequence that run side by side.
    """

    chunk: int = 64
    value: int = 64
    stages: int = 4
    stretches: int = 1


class _Plan(NamedTuple):
    """What a kernel is built from; `reverse` runs from the last token to the first."""

    blocks: Blocks
    parts: int  # bf16 arrays that make up one operand
    length: int
    chunks: int  # of the whole sequence
    stretch: int  # chunks a stretch, the last may have fewer
    stretches: int
    packed: bool
    reverse: bool


def why_not(q: _Shaped, v: _Shaped) -> str | None:
    """Why the kernel cannot take these queries and values; None where it can."""
    if max(q.shape[-1], v.shape[-1]) > 128:
        return f"its registers hold K, V <= 128; got K = {q.shape[-1]}, V = {v.shape[-1]}"
    if not {q.dtype, v.dtype} <= {jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32)}:
        return f"it takes bfloat16 and float32; got {q.dtype} and {v.dtype}"
    return None


def default_blocks(q: _Shaped, v: _Shaped, multiprocessors: int) -> Blocks:
    """Blocks that keep every multiprocessor busy with q [B, T, H, K] and v [B, T, H, V]."""
    batch, length, heads, _ = q.shape
    # float32 takes three times the shared memory.
    blocks = Blocks(stages=1 if jnp.float32 in (q.dtype, v.dtype) else Blocks().stages)
    rows = batch * heads * -(-v.shape[-1] // blocks.value)
    chunks = -(-length // blocks.chunk)
    # A stretch costs its state and a second reading of its k and v: not worth it for less than
    # 16 chunks, nor where three quarters of the multiprocessors work without it.
    if rows > multiprocessors * 3 // 4:
        return blocks
    return blocks._replace(stretches=max(min(multiprocessors // rows, chunks // 16), 1))


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def lightning_attention_mosaic_gpu(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    decay: jax.Array,
    segment_ids: jax.Array | None,
    initial_state: jax.Array,
    blocks: Blocks,
) -> tuple[jax.Array, jax.Array]:
    """`lightning_attention` on Hopper. Shapes as in the public function."""
    return _one_pass(q, k, v, decay, segment_ids, initial_state, blocks, reverse=False)


def _backward(
    blocks: Blocks, args: Arguments, cotangents: tuple[jax.Array, jax.Array]
) -> Cotangents:
    q, k, v, decay, segments, initial_state = args
    d_out, d_state = cotangents
    transposed, d_transposed = initial_state.swapaxes(-1, -2), d_state.swapaxes(-1, -2)
    d_q, _ = _one_pass(d_out, v, k, decay, segments, transposed, blocks, reverse=False)
    d_k, _ = _one_pass(v, d_out, q, decay, segments, d_transposed, blocks, reverse=True)
    d_v, d_initial = _one_pass(k, q, d_out, decay, segments, d_state, blocks, reverse=True)
    return of_inputs(args, d_q.astype(q.dtype), d_k.astype(k.dtype), d_v.astype(v.dtype), d_initial)


lightning_attention_mosaic_gpu.defvjp(keep_inputs(lightning_attention_mosaic_gpu), _backward)


# Lowering a kernel takes seconds of Python; under jit every layer of a model shares one lowering,
# and so do a layer's passes of one direction.
@functools.partial(jax.jit, static_argnames=("blocks", "reverse"))
def _one_pass(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    decay: jax.Array,
    segment_ids: jax.Array | None,
    state: jax.Array,
    blocks: Blocks,
    *,
    reverse: bool,
) -> tuple[jax.Array, jax.Array]:
    length, key_dim, value_dim = q.shape[1], q.shape[-1], v.shape[-1]
    dtype = jnp.result_type(q, k, v)
    q_parts, k_parts, v_parts = (
        # A tile of eight tokens is the least that TMA moves into shared memory.
        _parts(_pad(_pad(x.astype(dtype), 1, 8), 3, _LANES))
        for x in (q, k, v)
    )
    state = _pad(_pad(state, 2, _LANES), 3, _LANES)
    chunks = -(-length // blocks.chunk)
    half = -(-chunks // (2 * blocks.stretches))
    stretch = 2 * half
    plan = _Plan(
        blocks=blocks,
        parts=len(q_parts),
        length=length,
        chunks=chunks,
        stretch=stretch,
        stretches=-(-chunks // stretch),
        packed=segment_ids is not None,
        reverse=reverse,
    )
    clock = None
    if segment_ids is not None:
        missing = chunks * blocks.chunk - length
        clock = read_clock(jnp.pad(segment_ids, ((0, 0), (0, missing))))
    steps = _step_table(plan, clock)
    rate = decay * LOG2E
    starts = state[:, None]
    if plan.stretches > 1:
        # Half a stretch a block of threads: two such blocks share a multiprocessor.
        pieces = plan._replace(stretch=half, stretches=-(-plan.chunks // half))
        added = _added_states(pieces, k_parts, v_parts, rate, steps)
        starts = _starts(plan, pieces, added, state, rate, clock)
    out, final = _attend(plan, q_parts, k_parts, v_parts, rate, steps, starts)
    return out[:, :length, :, :value_dim].astype(v.dtype), final[:, :, :key_dim, :value_dim]


def _pad(x: jax.Array, axis: int, multiple: int) -> jax.Array:
    missing = -x.shape[axis] % multiple
    widths = [(0, missing if i == axis else 0) for i in range(x.ndim)]
    return jnp.pad(x, widths) if missing else x


def _parts(x: jax.Array) -> list[jax.Array]:
    """bf16 arrays that sum to x, largest first: one for bf16, three for float32."""
    if x.dtype == jnp.bfloat16:
        return [x]
    parts = []
    for _ in range(3):
        # Not astype there and back, which XLA takes for a no-op.
        part = lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
        parts.append(part.astype(jnp.bfloat16))
        x = x - part
    return parts


# Rows of the table of decay steps, see `_step_table`.
_ENTERING, _LEAVING, _PLACE, _RUN, _SCALARS = range(5)


def _step_table(plan: _Plan, clock: Clock | None) -> jax.Array:
    """Decay steps of every chunk, float32 [B, chunks, 5, C].

    Rows: steps from the state before the chunk to token i; from token j to the state after the
    chunk; place of a token in the chunk without padding; run within the chunk. Each is -1 where
    the weight is 0. The last row holds two scalars: 1 for a chunk without padding that is of one
    run with the token before it, and the steps across the chunk, -1 if the state does not survive.

    Without segments all chunks are alike but the last: [1, 2, 5, C].
    """
    size = plan.blocks.chunk
    if clock is None:
        tokens = jnp.array([[size], [plan.length - (plan.chunks - 1) * size]], jnp.int32)
        place = jnp.arange(size, dtype=jnp.int32)[None]
        real = (place < tokens)[None]  # [1, 2, C]
        tally, run = jnp.minimum(place + 1, tokens)[None], jnp.zeros(real.shape, jnp.int32)
        tally_before, run_before = (jnp.zeros((1, 2, 1), jnp.int32) for _ in range(2))
    else:
        shape = (clock.real.shape[0], plan.chunks, size)
        real, tally, run = (x.reshape(shape) for x in clock)
        tally_before, run_before = (
            jnp.pad(x[:, :-1, -1:], ((0, 0), (1, 0), (0, 0))) for x in (tally, run)
        )
    tally_last, run_last = tally[..., -1:], run[..., -1:]
    entering = jnp.where(real & (run == run_before), tally - tally_before, -1)
    leaving = jnp.where(real & (run == run_last), tally_last - tally, -1)
    survives = run_last == run_before
    whole = jnp.all(real, axis=-1, keepdims=True) & survives
    across = jnp.where(survives, tally_last - tally_before, -1)
    scalars = jnp.concatenate([whole.astype(jnp.int32), across], axis=-1)
    rows = [
        *((leaving, entering) if plan.reverse else (entering, leaving)),
        tally - tally_before,
        jnp.where(real, run - run_before, -1),
        jnp.pad(scalars, ((0, 0), (0, 0), (0, size - 2))),
    ]
    return jnp.stack(rows, axis=2).astype(jnp.float32)


def _starts(
    plan: _Plan,
    pieces: _Plan,
    added: jax.Array,
    state: jax.Array,
    rate: jax.Array,
    clock: Clock | None,
) -> jax.Array:
    """The state that each stretch starts from, [B, stretches, H, K, V].

    `state` and what each piece of the sequence adds reach a stretch decayed by the tokens between,
    unless a segment starts there.
    """
    end = plan.length if clock is None else plan.chunks * plan.blocks.chunk

    def borders(cut: _Plan) -> np.ndarray:
        """Tokens before each border of the cut, the ends of the sequence among them."""
        return np.minimum(np.arange(cut.stretches + 1) * cut.stretch * cut.blocks.chunk, end)

    # A pass enters a stretch at one border, and leaves a piece at the other, where what it adds
    # stands.
    if plan.reverse:
        enters, origins = borders(plan)[1:], np.append(end, borders(pieces)[1:-1])
        behind = origins[None] >= enters[:, None]
    else:
        enters, origins = borders(plan)[:-1], np.append(0, borders(pieces)[1:-1])
        behind = origins[None] <= enters[:, None]
    (tally_in, run_in), (tally_out, run_out) = (_at(clock, x) for x in (enters, origins))
    gap = jnp.abs(tally_in[:, :, None] - tally_out[:, None])
    reaches = (run_in[:, :, None] == run_out[:, None]) & jnp.asarray(behind)[None]
    steps = jnp.where(reaches, gap, -1)[:, :, None]  # [B, stretches, 1, origins]
    weights = _decayed(rate[None, None, :, None], steps)[..., None, None]
    # One pass over everything, where a contraction would transpose the states first.
    sources = [state, *(added[i] for i in range(len(origins) - 1))]
    terms = [weights[:, :, :, i] * x[:, None] for i, x in enumerate(sources)]
    return functools.reduce(jnp.add, terms)


def _at(clock: Clock | None, borders: np.ndarray) -> tuple[jax.Array, jax.Array]:
    """Real tokens before each border, and the run of the last of them, [B, borders] float32."""
    if clock is None:
        return jnp.asarray(borders[None], jnp.float32), jnp.zeros((1, len(borders)), jnp.float32)
    inside = jnp.asarray(borders > 0)[None]
    before = np.maximum(borders - 1, 0)
    tally, run = (
        jnp.where(inside, x[:, before], 0).astype(jnp.float32) for x in (clock.tally, clock.run)
    )
    return tally, run


def _decayed(rate: jax.Array, steps: jax.Array) -> jax.Array:
    """exp2(-rate steps), and 0 where steps < 0: no exponent is ever positive."""
    return jnp.where(steps >= 0, jnp.exp2(-rate * jnp.maximum(steps, 0)), 0)


def _reach(plan: _Plan, rate: jax.Array) -> jax.Array:
    """Chunks that a state remembers [H] int32: what is older is multiplied by 2⁻¹⁵⁰ or less, which
    float32 rounds to zero. All of them in packed rows, whose chunks may hold few real tokens.
    """
    if plan.packed:
        return jnp.full(rate.shape, plan.chunks, jnp.int32)
    chunks = 150 / jnp.maximum(rate * plan.blocks.chunk, 150 / plan.chunks)
    return jnp.ceil(chunks).astype(jnp.int32) + 1


# From here on code runs inside the kernels.


class _Share(NamedTuple):
    """The share of the work that a block of threads has."""

    batch: jax.Array
    head: jax.Array
    columns: Any  # of v
    first: jax.Array  # chunk of the stretch
    chunks: jax.Array  # of the stretch


def _share(plan: _Plan, heads: int, stretch: jax.Array) -> _Share:
    row = lax.axis_index("row")
    value = plan.blocks.value
    first = stretch * plan.stretch
    return _Share(
        batch=lax.div(row, jnp.int32(heads)),
        head=lax.rem(row, jnp.int32(heads)),
        columns=pl.ds(lax.axis_index("columns") * value, value),
        first=first,
        chunks=jnp.minimum(plan.stretch, plan.chunks - first),
    )


def _end_of(plan: _Plan, share: _Share, reach: jax.Array) -> _Share:
    """The chunks of a share that its state remembers at the end of the pass."""
    chunks = jnp.minimum(share.chunks, reach)
    first = share.first if plan.reverse else share.first + share.chunks - chunks
    return share._replace(first=first, chunks=chunks)


def _chunk(plan: _Plan, share: _Share, n: jax.Array) -> jax.Array:
    """The chunk that the pass comes to n-th."""
    return share.first + (share.chunks - 1 - n if plan.reverse else n)


class _Stream(NamedTuple):
    """Buffers of the chunks in flight, and their barriers, one a stage.

    tiles: for each operand, [stages, parts, C, K or V]; table [stages, 5, C].
    """

    tiles: Sequence[Ref]
    table: Ref
    loaded: Barriers
    consumed: Barriers


def _keep_loading(
    plan: _Plan,
    share: _Share,
    sources: Sequence[tuple[Sequence[Ref], Any]],
    table_ref: Ref,
    stream: _Stream,
) -> None:
    """Loads chunk after chunk as stages fall free. sources: parts and columns of each operand."""
    stages, size = plan.blocks.stages, plan.blocks.chunk

    def load(n: jax.Array) -> None:
        stage = lax.rem(n, jnp.int32(stages))
        chunk = _chunk(plan, share, n)
        tokens = pl.ds(chunk * size, size)
        for (refs, columns), tile in zip(sources, stream.tiles, strict=True):
            for part, ref in enumerate(refs):
                window = ref.at[share.batch, tokens, share.head, columns]
                plgpu.copy_gmem_to_smem(
                    window,
                    tile.at[stage, part],
                    stream.loaded.at[stage],
                    # q and k are the same for all columns: read once, sent to the whole cluster.
                    collective_axes=None if columns is share.columns else "columns",
                )
        last = (chunk == plan.chunks - 1).astype(jnp.int32)
        steps = table_ref.at[share.batch, chunk] if plan.packed else table_ref.at[0, last]
        plgpu.copy_gmem_to_smem(steps, stream.table.at[stage], stream.loaded.at[stage])

    def wait(n: jax.Array) -> None:
        plgpu.barrier_wait(stream.consumed.at[lax.rem(n, jnp.int32(stages))])

    pl.loop(0, jnp.minimum(stages, share.chunks))(load)

    @pl.loop(stages, share.chunks)
    def _refill(n: jax.Array) -> None:
        wait(n)
        load(n)

    # The other blocks of the cluster announce here what they consumed: stay until they have.
    pl.loop(jnp.maximum(share.chunks - stages, 0), share.chunks)(wait)


def _dot(
    shape: tuple[int, int],
    a: Sequence[Any],
    b: Sequence[Any],
    meanwhile: Callable[[], None] = lambda: None,
) -> jax.Array:
    """The product of two sums of bf16 arrays, in float32 registers; small terms first."""
    pairs = [(i, j) for i in range(len(a)) for j in range(len(b)) if i + j < len(a)]

    def product(acc: Ref) -> jax.Array:
        for i, j in sorted(pairs, key=sum, reverse=True):
            plgpu.wgmma(acc, a[i], b[j])
        meanwhile()
        return acc[...]

    return pl.run_scoped(product, plgpu.ACC(shape, jnp.float32))


def _split(x: jax.Array, parts: int) -> list[jax.Array]:
    """Registers x as bf16 arrays that sum to it."""
    split = []
    for _ in range(parts):
        split.append(x.astype(jnp.bfloat16))
        x = x - split[-1].astype(jnp.float32)
    return split


def _along(x: jax.Array, shape: tuple[int, ...], axis: int) -> jax.Array:
    """A vector of that axis, repeated over the other."""
    return lax.broadcast_in_dim(x, shape, [axis])


def _steps(stream: _Stream, stage: jax.Array, row: int, layout: Any) -> jax.Array:
    return plgpu.load(stream.table.at[stage, row], layout=layout, optimized=False)


def _advance(
    state: jax.Array,
    rate: jax.Array,
    k_tile: Ref,
    v_tile: Ref,
    stream: _Stream,
    values_smem: Ref,
    stage: jax.Array,
    meanwhile: Callable[[], None] = lambda: None,
) -> jax.Array:
    """The state after a chunk, keep S + kᵀ (leaving ∘ v), in registers.

    `meanwhile` runs while the tensor cores work.
    """
    parts = range(v_tile.shape[1])
    loaded = [plgpu.load(v_tile.at[stage, part], layout=MATRIX) for part in parts]
    v = functools.reduce(jnp.add, (x.astype(jnp.float32) for x in loaded))
    weights = _decayed(rate, _steps(stream, stage, _LEAVING, ROW))
    for part, x in enumerate(_split(v * _along(weights, v.shape, 0), len(parts))):
        values_smem.at[part][...] = x
    plgpu.commit_smem()
    keys = [k_tile.at[stage, part].transpose((1, 0)) for part in parts]
    added = _dot(
        (state.shape[0], state.shape[1]), keys, [values_smem.at[part] for part in parts], meanwhile
    )
    return state * _decayed(rate, stream.table[stage, _SCALARS, 1]) + added


class _Within(NamedTuple):
    """Decay weights between the tokens of one chunk."""

    plan: _Plan
    rate: jax.Array

    def _mask(self) -> tuple[jax.Array, jax.Array]:
        """Pairs that see each other, and steps between them, if the chunk is whole."""
        shape = (self.plan.blocks.chunk,) * 2
        i, j = (plgpu.broadcasted_iota(jnp.int32, shape, a, layout=MATRIX) for a in (0, 1))
        gap = j - i if self.plan.reverse else i - j
        return gap >= 0, gap.astype(jnp.float32)

    def whole(self) -> jax.Array:
        return _decayed(self.rate, self._mask()[1])

    def packed(self, stream: _Stream, stage: jax.Array) -> jax.Array:
        causal, _ = self._mask()

        def pair(row: int) -> list[jax.Array]:
            return [
                _along(_steps(stream, stage, row, layout), causal.shape, axis)
                for axis, layout in enumerate((ROW, COLUMN))
            ]

        (place_i, place_j), (run_i, run_j) = pair(_PLACE), pair(_RUN)
        gap = place_j - place_i if self.plan.reverse else place_i - place_j
        same = causal & (run_i == run_j) & (run_j >= 0)
        return jnp.where(same, jnp.exp2(-self.rate * jnp.maximum(gap, 0)), 0)


def _attend(
    plan: _Plan,
    q: Sequence[jax.Array],
    k: Sequence[jax.Array],
    v: Sequence[jax.Array],
    rate: jax.Array,
    steps: jax.Array,
    starts: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """out [B, T, H, V] and the state at the end of the pass [B, H, K, V]."""
    batch, length, heads, key_dim = q[0].shape
    value_dim = v[0].shape[-1]
    parts, (size, value, stages, _) = plan.parts, plan.blocks
    out_dtype = jnp.bfloat16 if parts == 1 else jnp.float32

    def body(*refs: Ref) -> None:
        q_refs, k_refs, v_refs = (refs[i * parts : (i + 1) * parts] for i in range(3))
        rate_ref, table_ref, starts_ref, out_ref, final_ref, *scratch = refs[3 * parts :]
        q_tile, k_tile, v_tile, table, values_smem, state_smem, out_smem, *barriers = scratch
        loaded, consumed, state_ready, state_free = barriers
        stream = _Stream((q_tile, k_tile, v_tile), table, loaded, consumed)
        stretch = lax.axis_index("stretch")
        share = _share(plan, heads, stretch)
        warp_group = lax.axis_index("warp_group")
        rate = rate_ref[share.head]

        @pl.when(warp_group == 0)
        def _write_outputs() -> None:
            plgpu.set_max_registers(_WORKER_REGISTERS, action="increase")
            within = _Within(plan, rate)
            whole = within.whole()
            plgpu.barrier_arrive(state_free)

            def write(n: jax.Array, _: None) -> None:
                stage = lax.rem(n, jnp.int32(stages))
                plgpu.barrier_wait(loaded.at[stage])
                queries, keys, values = (
                    [tile.at[stage, part] for part in range(parts)] for tile in stream.tiles
                )
                scores = _dot((size, size), queries, [ref.transpose((1, 0)) for ref in keys])
                weights = lax.cond(
                    table[stage, _SCALARS, 0] > 0,
                    lambda: whole,
                    lambda: within.packed(stream, stage),
                )
                attention = _split(scores * weights, parts)
                plgpu.barrier_wait(state_ready)
                state = [state_smem.at[part] for part in range(parts)]
                out = _dot((size, value), queries, state)
                plgpu.barrier_arrive(state_free)
                entering = _decayed(rate, _steps(stream, stage, _ENTERING, ROW))
                out = out * _along(entering, out.shape, 0) + _dot((size, value), attention, values)
                plgpu.barrier_arrive(consumed.at[stage])
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                out_smem[...] = out.astype(out_dtype)
                plgpu.commit_smem()
                tokens = pl.ds(_chunk(plan, share, n) * size, size)
                window = out_ref.at[share.batch, tokens, share.head, share.columns]
                plgpu.copy_smem_to_gmem(out_smem, window)

            lax.fori_loop(0, share.chunks, write, None)
            plgpu.wait_smem_to_gmem(0)

        @pl.when(warp_group == 1)
        def _carry_state() -> None:
            plgpu.set_max_registers(_WORKER_REGISTERS, action="increase")

            def carry(n: jax.Array, state: jax.Array) -> jax.Array:
                stage = lax.rem(n, jnp.int32(stages))

                def hand_over() -> None:
                    plgpu.barrier_wait(state_free)
                    for part, x in enumerate(_split(state, parts)):
                        state_smem.at[part][...] = x
                    plgpu.commit_smem()
                    plgpu.barrier_arrive(state_ready)

                plgpu.barrier_wait(loaded.at[stage])
                state = _advance(state, rate, k_tile, v_tile, stream, values_smem, stage, hand_over)
                plgpu.barrier_arrive(consumed.at[stage])
                return state

            start = starts_ref.at[share.batch, stretch, share.head, :, share.columns]
            state = plgpu.load(start, layout=MATRIX, optimized=False)
            state = lax.fori_loop(0, share.chunks, carry, state)

            @pl.when(stretch == (0 if plan.reverse else plan.stretches - 1))
            def _end() -> None:
                final_ref[share.batch, share.head, :, share.columns] = state

        @pl.when(warp_group == 2)
        def _load() -> None:
            plgpu.set_max_registers(_LOADER_REGISTERS, action="decrease")
            every = pl.ds(0, key_dim)
            sources = ((q_refs, every), (k_refs, every), (v_refs, share.columns))
            _keep_loading(plan, share, sources, table_ref, stream)

    return plgpu.kernel(
        body,
        out_type=(
            jax.ShapeDtypeStruct((batch, length, heads, value_dim), out_dtype),
            jax.ShapeDtypeStruct((batch, heads, key_dim, value_dim), jnp.float32),
        ),
        scratch_types=(
            _tiles(stages, parts, size, key_dim),
            _tiles(stages, parts, size, key_dim),
            _tiles(stages, parts, size, value),
            plgpu.SMEM((stages, 5, size), jnp.float32),
            _tiles(parts, size, value),
            _tiles(parts, key_dim, value),
            plgpu.SMEM((size, value), out_dtype, transforms=tiled(jnp.dtype(out_dtype).itemsize)),
            plgpu.Barrier(num_arrivals=3 * parts + 1, num_barriers=stages),
            plgpu.ClusterBarrier(collective_axes=("columns",), num_arrivals=2, num_barriers=stages),
            plgpu.Barrier(),
            plgpu.Barrier(),
        ),
        grid=(batch * heads, plan.stretches),
        grid_names=("row", "stretch"),
        cluster=(value_dim // value,),
        cluster_names=("columns",),
        num_threads=3,
        thread_name="warp_group",
        compiler_params=_PARAMS,
    )(*q, *k, *v, rate, steps, starts)


def _added_states(
    plan: _Plan,
    k: Sequence[jax.Array],
    v: Sequence[jax.Array],
    rate: jax.Array,
    steps: jax.Array,
) -> jax.Array:
    """What each stretch adds to the state, [stretches - 1, B, H, K, V] float32.

    All but the stretch that the pass comes to last, whose state starts no other.
    """
    batch, _, heads, key_dim = k[0].shape
    value_dim = v[0].shape[-1]
    parts, (size, value, stages, _) = plan.parts, plan.blocks

    def body(*refs: Ref) -> None:
        k_refs, v_refs = refs[:parts], refs[parts : 2 * parts]
        rate_ref, reach_ref, table_ref, added_ref, *scratch = refs[2 * parts :]
        k_tile, v_tile, table, values_smem, loaded, consumed = scratch
        stream = _Stream((k_tile, v_tile), table, loaded, consumed)
        index = lax.axis_index("stretch")
        share = _share(plan, heads, index + 1 if plan.reverse else index)
        share = _end_of(plan, share, reach_ref[share.head])
        warp_group = lax.axis_index("warp_group")

        @pl.when(warp_group == 0)
        def _carry_state() -> None:
            rate = rate_ref[share.head]

            def carry(n: jax.Array, state: jax.Array) -> jax.Array:
                stage = lax.rem(n, jnp.int32(stages))
                plgpu.barrier_wait(loaded.at[stage])
                state = _advance(state, rate, k_tile, v_tile, stream, values_smem, stage)
                plgpu.barrier_arrive(consumed.at[stage])
                return state

            zeros = plgpu.layout_cast(jnp.zeros((key_dim, value), jnp.float32), MATRIX)
            state = lax.fori_loop(0, share.chunks, carry, zeros)
            added_ref[index, share.batch, share.head, :, share.columns] = state

        @pl.when(warp_group == 1)
        def _load() -> None:
            sources = ((k_refs, pl.ds(0, key_dim)), (v_refs, share.columns))
            _keep_loading(plan, share, sources, table_ref, stream)

    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct(
            (plan.stretches - 1, batch, heads, key_dim, value_dim), jnp.float32
        ),
        scratch_types=(
            _tiles(stages, parts, size, key_dim),
            _tiles(stages, parts, size, value),
            plgpu.SMEM((stages, 5, size), jnp.float32),
            _tiles(parts, size, value),
            plgpu.Barrier(num_arrivals=2 * parts + 1, num_barriers=stages),
            plgpu.ClusterBarrier(collective_axes=("columns",), num_arrivals=1, num_barriers=stages),
        ),
        grid=(batch * heads, plan.stretches - 1),
        grid_names=("row", "stretch"),
        cluster=(value_dim // value,),
        cluster_names=("columns",),
        num_threads=2,
        thread_name="warp_group",
        compiler_params=_PARAMS,
    )(*k, *v, rate, _reach(plan, rate), steps)


def _tiles(*shape: int) -> Any:
    return plgpu.SMEM(shape, jnp.bfloat16, transforms=tiled(2))
