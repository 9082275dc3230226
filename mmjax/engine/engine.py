"""The engine: continuous batching over slots, chunked prefill, paged KV, kept prefixes."""

from __future__ import annotations

import contextlib
import itertools
import random
import secrets
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding

from kernels_pallas import dispatch
from mmjax.engine.images import Features, ImagePrompt
from mmjax.engine.memory import Memory
from mmjax.engine.pages import Prefix
from mmjax.engine.programs import (
    BURST,
    compiled,
    decode_programs,
    idle_rows,
    pack_rows,
    prefill_rows,
)
from mmjax.engine.results import Completion, EngineStats, Output, RequestError, TokenLogprob
from mmjax.engine.sample import Chunk, Request, Sample, Schedule, seed_words
from mmjax.engine.sampling import SamplingParams, Wanted
from mmjax.model import Decoder, ImageTokens
from mmjax.sharding import SERVING_RULES, make_mesh, param_shardings
from mmjax.tokenizer import Tokenizer
from mmjax.vision import Image, ImageError, expand_images

# Rows of the narrowest decode program: XLA's products on CPUs sum in another order for fewer rows,
# and a sample's bits should not depend on how many others run.
MIN_ROWS = 4
# Decode steps between two looks at the queue while prompts wait to be computed.
SHORT_BURST = 4
# More layers than this are scanned: their programs would take too long to compile.
UNROLLED_LAYERS = 48
# Bytes of keys and values if nothing says how many pages there are: of a device's free memory, or
# of a CPU's, which says nothing about its own.
KV_SHARE, CPU_KV_BYTES = 0.6, 1 << 30
MAX_SAMPLES = 1024
# Tokens that a decode program's page table holds, where that is less than all: on a GPU or TPU a
# program reads as many of every row. On CPUs it reads what the longest row has.
TABLE_TOKENS = (512, 4096)

type Prompt = str | Sequence[int] | np.ndarray | ImagePrompt


class Engine:
    """Runs requests side by side; they join and leave between bursts of decode steps.

    Not safe for several threads: one thread calls everything. On a mesh of several processes each
    of them has an engine and makes the same calls in the same order; all get the same outputs.

    Args:
      model: The decoder; on a mesh the engine runs on that mesh.
      tokenizer: For prompts that are texts, for the text of outputs, stop strings and thinking
        budgets; None for token ids alone.
      max_slots: Samples that run at a time.
      max_length: Most tokens of a prompt and its completion; None for 32,768, or for what the
        model or the pages hold if that is less.
      page_size: Tokens of a KV page.
      num_pages: KV pages; None for `max_slots` samples of `max_length` tokens, or for what memory
        leaves if that is less.
      prefill_chunk: Most prompt tokens that are computed at once.
      prefix_block: First border at which prompts are cut and their prefixes kept; further ones
        are at its doubles up to `prefill_chunk`, then at the multiples of that. None for an eighth
        of `prefill_chunk`, or all of it where no prefix is kept.
      num_prefixes: Prefixes kept at most; each takes a lightning state and holds its pages until
        others need them.
      int8_experts: Keep the experts' matrices in int8, with a scale for each column: half of
        bfloat16's memory, and rounding that docs/engine.md has figures of.

    Raises:
      ValueError: sizes that do not fit together.
    """

    def __init__(
        self,
        model: Decoder,
        tokenizer: Tokenizer | None = None,
        *,
        max_slots: int = 16,
        max_length: int | None = None,
        page_size: int = 64,
        num_pages: int | None = None,
        prefill_chunk: int = 2048,
        prefix_block: int | None = None,
        num_prefixes: int = 16,
        int8_experts: bool = False,
    ) -> None:
        if prefix_block is None:
            prefix_block = max(prefill_chunk // 8, 16) if num_prefixes else prefill_chunk
        for name, value, least in (
            ("max_slots", max_slots, 1),
            ("max_length", max_length, 1),
            ("page_size", page_size, 1),
            ("num_pages", num_pages, 1),
            ("prefix_block", prefix_block, 16),
            ("num_prefixes", num_prefixes, 0),
        ):
            if value is not None and value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        _check_chunks(prefill_chunk, prefix_block)
        self.cfg, self.tokenizer = model.cfg, tokenizer
        self._mesh, self._device = _mesh_of(model), _device_of(model)
        self._context = self._mesh or make_mesh(devices=[self._device])
        self._schedule = Schedule(prefix_block, prefill_chunk)
        self._slots, self._widths = max_slots, _widths(max_slots)
        with self._on_mesh():
            self._unstack = _unstacker(model, self._mesh, int8_experts)
            state = nnx.state(model)
            self._params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)
            graphdef, params = self._unstack(state)
            self._leaves, treedef = jax.tree.flatten(params)
            self._programs = compiled(graphdef, treedef)
            self._features = None
            if self.cfg.vision is not None:
                self._features = Features(self.cfg.vision, self._run_tower)
            longest = 32768 if max_length is None else max_length
            longest = min(longest, self.cfg.max_position_embeddings)
            width = -(-longest // page_size)
            pages = _affordable_pages(self.cfg, page_size, self._device)
            affordable = int(_of_all(np.int32(pages), self._mesh).min())
            pages = num_pages or min(max_slots * width, affordable)
            self.max_length = min(longest, pages * page_size)
            self._memory = Memory(
                self.cfg,
                slots=max_slots,
                pages=pages,
                page_size=page_size,
                # A chunk's padding may reach past the last token.
                table_width=max(width, -(-prefill_chunk // page_size)),
                prefixes=num_prefixes,
            )
            self._table_widths = _table_widths(width, page_size)
        self._waiting: list[Sample] = []
        self._running: list[Sample] = []
        self._seeds: dict[str, int] = {}
        entropy = np.frombuffer(secrets.token_bytes(16), np.int32)
        self._random = random.Random(_of_all(entropy, self._mesh)[0].tobytes())
        self._samples: dict[str, list[Sample]] = {}
        self._ended: list[Output] = []
        self._arrivals = 0
        self._prompt_tokens = self._cached_tokens = self._generated_tokens = 0
        self._preemptions = 0

    # Requests.

    def add(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
    ) -> str:
        """Takes in a request.

        Args:
          prompt: Text, which needs a tokenizer and to which nothing is added; or token ids; or one
            of them with images.
          params: How to sample; None for the defaults.
          request_id: A name that no unfinished request has; None for a new one.

        Returns:
          The request's name.

        Raises:
          RequestError: the request cannot be run; the message says why.
        """
        params = params or SamplingParams()
        ids, images = self._checked(prompt, params)
        name = self._new_name() if request_id is None else request_id
        if self._owes({name}):
            raise RequestError(f"request {name!r} is still running; choose another request_id")
        request = Request(name, ids, params, self._stop_ids(params), self._schedule, images)
        self._seeds[name] = self._random.getrandbits(63) if params.seed is None else params.seed
        samples = [
            Sample.create(request, index, self._arrivals + index, self.tokenizer)
            for index in range(params.n)
        ]
        self._arrivals += params.n
        self._samples[name] = samples
        self._waiting += samples
        return name

    def _new_name(self) -> str:
        names = (f"request-{number}" for number in itertools.count(self._arrivals))
        return next(name for name in names if not self._owes({name}))

    def _owes(self, names: set[str]) -> bool:
        """Whether there are outputs of these requests to come, or to be given by the next step."""
        return not names.isdisjoint(self._samples) or any(
            output.request_id in names for output in self._ended
        )

    def cancel(self, request_id: str) -> bool:
        """Ends a request, whose samples give one more Output each; False if it is unknown."""
        samples = list(self._samples.get(request_id, []))
        for sample in samples:
            self._end(sample)
            self._ended.append(sample.output([], sample.text.finish(), None, "cancelled"))
        return bool(samples)

    @property
    def has_work(self) -> bool:
        """Whether `step` has anything to do or to give."""
        return bool(self._waiting or self._running or self._ended)

    def stats(self) -> EngineStats:
        """What the engine holds and has done."""
        memory = self._memory
        return EngineStats(
            running=len(self._running),
            waiting=len(self._waiting),
            swapped=sum(sample.moved is not None for sample in self._waiting),
            slots=self._slots,
            pages_used=memory.total - memory.pages.free,
            pages_cached=memory.cached_pages(),
            pages_total=memory.total,
            prompt_tokens=self._prompt_tokens,
            cached_prompt_tokens=self._cached_tokens,
            generated_tokens=self._generated_tokens,
            preemptions=self._preemptions,
        )

    def generate(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[Completion]:
        """Runs prompts to their ends.

        Args:
          prompts: Texts or token ids.
          params: For all prompts, or for each.

        Returns:
          The samples of the prompts in order, those of one prompt side by side.

        Raises:
          RequestError: a prompt cannot be run; none of them is then.
        """
        each = (
            params if isinstance(params, Sequence) else [params or SamplingParams()] * len(prompts)
        )
        done: dict[tuple[str, int], Completion] = {}
        names: set[str] = set()
        try:
            for prompt, how in zip(prompts, each, strict=True):
                name = self.add(prompt, how)
                names.add(name)
                done |= {(name, i): Completion(name, i) for i in range(how.n)}
            while self._owes(names):
                for output in self._step_for(names):
                    done[output.request_id, output.index].extend(output)
        except BaseException:
            self._forget(names)
            raise
        return list(done.values())

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Iterator[Output]:
        """Runs one prompt and gives what its samples gain, as it comes.

        Raises:
          RequestError: the prompt cannot be run.
        """
        name = self.add(prompt, params)
        try:
            while self._owes({name}):
                yield from self._step_for({name})
        finally:
            self._forget({name})

    def _step_for(self, names: set[str]) -> list[Output]:
        """A round of work; what others gained in it waits for the next `step`."""
        outputs = self.step()
        self._ended += [output for output in outputs if output.request_id not in names]
        return [output for output in outputs if output.request_id in names]

    def _forget(self, names: set[str]) -> None:
        """Ends requests without a word."""
        for name in names:
            self.cancel(name)
        self._ended = [output for output in self._ended if output.request_id not in names]

    # Weights.

    def update(self, model: Decoder | nnx.State) -> None:
        """Takes new weights of the same architecture, on the same mesh or another.

        Kept prefixes are dropped, and unfinished samples computed anew with these weights, from
        their tokens so far.

        Args:
          model: A decoder, or the state of its parameters; cast to the dtypes of those before.

        Raises:
          ValueError: parameters of another architecture; the engine goes on with those it has.
        """
        state = _like(nnx.state(model) if isinstance(model, Decoder) else model, self._params)
        self._leaves = []  # Not held beside the new ones.
        with self._on_mesh():
            self._leaves = jax.tree.leaves(self._unstack(state)[1])
        self._memory.prefixes.clear()
        if self._features is not None:
            self._features.clear()
        for sample in [*self._running, *self._waiting]:
            self._memory.release(sample)
            sample.computed = 0
        self._waiting = sorted([*self._running, *self._waiting], key=lambda s: s.order)
        self._running = []

    def warm_up(self) -> None:
        """Compiles every program; from here on nothing is compiled."""
        with self._on_mesh():
            for size in self._schedule.sizes:
                self._run_chunks([], size)
                if self._features is not None:
                    nothing = np.zeros((1, size, self.cfg.hidden_size), self.cfg.dtype)
                    images = ImageTokens(nothing, np.full((1, size), -1, np.int32))  # type: ignore[arg-type]
                    self._run_chunks([], size, images)
            if self._features is not None:
                self._features.warm_up()
            for shape in itertools.product(self._widths, self._table_widths):
                for wanted in decode_programs(shape[0]):
                    table = np.zeros(shape, np.int32)
                    self._run_burst(idle_rows(shape[0]), table, 0, wanted, top=False)
            self._memory.warm_up()

    # One round.

    def step(self) -> list[Output]:
        """Admits samples, computes some prompt tokens, decodes a burst; says what came of it."""
        outputs, self._ended = self._ended, []
        with self._on_mesh():
            self._admit()
            if self._prefill() and self._waiting:
                self._admit()  # Those who waited for a prefix that is now kept decode along.
            outputs += self._decode()
        return outputs

    def _admit(self) -> None:
        """Gives slots and pages to waiting samples, in the order of arrival.

        A sample that a running one is computing a prefix for waits for it, and a slot with it.
        """
        filling = {
            digest
            for sample in self._running
            if sample.computed < sample.target
            for end, digest in sample.digests()
            if end > sample.computed
        }
        blocked: list[Sample] = []
        while self._waiting and self._memory.free_slots > len(blocked):
            sample = self._waiting.pop(0)
            if sample.moved is None and self._awaits(sample, filling):
                blocked.append(sample)
            elif self._start(sample):
                self._running.append(sample)
                if sample.computed < sample.target:
                    filling |= {digest for end, digest in sample.digests() if end > sample.computed}
            else:
                blocked.append(sample)
                break
        self._memory.fork()
        self._waiting = blocked + self._waiting

    def _awaits(self, sample: Sample, filling: set[bytes]) -> bool:
        """Whether a running sample is about to keep a longer prefix of this one than there is."""
        if not self._memory.keeps_prefixes:
            return False
        for _, digest in reversed(sample.digests()):
            if digest in self._memory.prefixes:
                return False
            if digest in filling:
                return True
        return False

    def _start(self, sample: Sample) -> bool:
        """Brings a sample in, back from the host or on its longest kept prefix."""
        if sample.moved is not None:
            room = min(max(sample.computed, sample.target) + BURST, sample.limit)
            return self._memory.move_in(sample, room)
        room = min(sample.target + BURST, sample.limit)
        prefix = self._longest_prefix(sample)
        if not self._memory.admit(sample, prefix, room):
            return False
        if not sample.new:
            sample.cached = sample.computed
            self._prompt_tokens += len(sample.request.prompt)
            self._cached_tokens += sample.cached
        return True

    def _longest_prefix(self, sample: Sample) -> Prefix | None:
        found = (self._memory.prefixes.get(digest) for _, digest in reversed(sample.digests()))
        return next((prefix for prefix in found if prefix), None)

    def _prefill(self) -> bool:
        """Computes chunks of prompts, the oldest first, `prefill_chunk` tokens at most; whether it
        computed any.
        """
        left, chunks = self._schedule.largest, list[Chunk]()
        for sample in self._running:
            while sample.computed < sample.target:
                end = self._schedule.end(sample.computed, sample.target)
                chunk = Chunk(
                    sample, sample.computed, end, self._schedule.size(end - sample.computed)
                )
                if chunk.size > left:
                    self._extend(chunks)
                    return True
                left -= chunk.size
                if chunks and not self._joins(chunk, chunks):
                    self._extend(chunks)
                    chunks = []
                chunks.append(chunk)
                sample.computed = end
        self._extend(chunks)
        return left < self._schedule.largest

    def _joins(self, chunk: Chunk, others: list[Chunk]) -> bool:
        """Whether a chunk can be computed in one call with others."""
        last = others[-1]
        return (
            chunk.size == last.size
            and chunk.sample is not last.sample
            and not (chunk.sample.request.images or last.sample.request.images)
            and len(others) < self._prefill_rows(chunk.size)
        )

    def _prefill_rows(self, size: int) -> int:
        return min(prefill_rows(self._schedule.largest // size), self._slots)

    def _extend(self, chunks: list[Chunk]) -> None:
        """Takes chunks of one size, each of another sample, into the cache."""
        if not chunks:
            return
        sample, start, end, size = chunks[0]
        images = None
        if sample.request.images:
            assert self._features is not None
            images = self._features.chunk(sample.request.images, start, end, size)
        self._run_chunks(chunks, size, images)
        for sample, _, end, _ in chunks:
            digest = dict(sample.digests()).get(end)
            assert digest is not None
            self._memory.keep_prefix(sample, digest)
        self._memory.fork()

    def _decode(self) -> list[Output]:
        """One burst for every sample whose prompt is in the cache."""
        busy = any(sample.computed < sample.target for sample in self._running)
        joining = bool(self._waiting) and self._memory.free_slots > 0
        most = SHORT_BURST if busy or joining else BURST
        rows = self._growing(most)
        if not rows:
            return []
        width = next(width for width in self._widths if width >= len(rows))
        longest = max(self._memory.pages_for(s.computed + steps) for s, steps in rows)
        pages = next(pages for pages in self._table_widths if pages >= longest)
        packed, table = idle_rows(width), np.zeros((width, pages), np.int32)
        packed[: len(rows)] = pack_rows(
            [
                sample.row(steps, seed_words(self._seeds[sample.request.id], sample.index))
                for sample, steps in rows
            ]
        )
        slots = np.array([sample.slot for sample, _ in rows])
        table[: len(rows)] = self._memory.table[slots, :pages]
        params = [sample.request.params for sample, _ in rows]
        wanted = Wanted.by(params)
        if wanted not in decode_programs(width):
            wanted = Wanted.ANYTHING
        longest_burst = max(steps for _, steps in rows)
        top = any(p.logprobs for p in params)
        burst = self._run_burst(packed, table, longest_burst, wanted, top=top)
        return [self._accept(sample, row, burst) for row, (sample, _) in enumerate(rows)]

    def _growing(self, most: int) -> list[tuple[Sample, int]]:
        """Samples to decode and for how many steps each, with pages for these.

        Where pages run out, the youngest samples go to the host until the older ones have theirs.
        """
        rows = []
        for sample in sorted(self._running, key=lambda s: s.order):
            if sample.slot is None or sample.computed < sample.target:
                continue
            steps = sample.steps(self.tokenizer, most)
            while not self._memory.grow(sample, sample.computed + steps):
                youngest = max(self._running, key=lambda s: s.order)
                room = len(sample.pages) * self._memory.page_size - sample.computed
                if youngest is not sample:
                    self._preempt(youngest)
                elif room > 0:
                    steps = min(steps, room)
                else:
                    self._preempt(sample)
                    break
            if sample.slot is not None:
                rows.append((sample, steps))
        return rows

    def _preempt(self, sample: Sample) -> None:
        self._memory.move_out(sample)
        self._running.remove(sample)
        self._waiting = sorted([*self._waiting, sample], key=lambda s: s.order)
        self._preemptions += 1

    def _accept(self, sample: Sample, row: int, burst: _Drawn) -> Output:
        count, run = burst.words[row, :2].tolist()
        ids = burst.words[row, 2 : 2 + count].tolist()
        output = sample.accept(ids, burst.logprobs(row, ids, sample.request.params), run)
        self._generated_tokens += len(output.token_ids)
        if output.finish_reason is not None:
            self._end(sample)
        return output

    def _end(self, sample: Sample) -> None:
        """Forgets a sample and frees what it holds."""
        self._memory.release(sample)
        for queue in (self._running, self._waiting):
            if sample in queue:
                queue.remove(sample)
        name = sample.request.id
        self._samples[name].remove(sample)
        if not self._samples[name]:
            del self._samples[name], self._seeds[name]

    # Calls of programs.

    def _run_tower(self, tiles: np.ndarray) -> np.ndarray:
        return np.asarray(self._programs.features(self._leaves, tiles))

    def _run_chunks(
        self, chunks: list[Chunk], size: int, images: ImageTokens | None = None
    ) -> None:
        """Prefills chunks of one size; image tokens are those of a single one."""
        rows = 1 if images is not None else self._prefill_rows(size)
        tokens, places = np.zeros((rows, size), np.int32), np.full((rows, 3), (-1, 0, 0), np.int32)
        table = np.zeros((rows, self._memory.table.shape[1]), np.int32)
        for row, (sample, start, end, _) in enumerate(chunks):
            assert sample.slot is not None
            tokens[row, : end - start] = sample.tokens()[start:end]
            places[row] = sample.slot, start, end - start
            table[row] = self._memory.table[sample.slot]
        self._memory.pools = self._programs.prefill(
            self._leaves, self._memory.pools, tokens, table, places, np.int32(len(chunks)), images
        )

    def _run_burst(
        self, packed: np.ndarray, table: np.ndarray, steps: int, wanted: Wanted, *, top: bool
    ) -> _Drawn:
        self._memory.pools, burst = self._programs.decode(
            self._leaves,
            self._memory.pools,
            packed,
            table,
            np.int32(steps),
            np.bool_(top),
            wanted=wanted,
        )
        return _Drawn(
            *jax.device_get(burst if top else burst._replace(top_ids=None, top_logprobs=None))
        )

    def _on_mesh(self) -> contextlib.AbstractContextManager[Any]:
        # One of a single device too, as the caller may have another in force.
        return jax.set_mesh(self._context)

    # Checks.

    def _stop_ids(self, params: SamplingParams) -> tuple[int, ...]:
        eos = self.cfg.eos_token_id if self.tokenizer is None else self.tokenizer.eos_id
        own = () if params.ignore_eos or eos is None else (eos,)
        return (*own, *params.stop_ids)

    def _checked(
        self, prompt: Prompt, params: SamplingParams
    ) -> tuple[np.ndarray, list[tuple[range, Image]]]:
        """The prompt's ids, and its images with the places of their tokens."""
        images: Sequence[Image] = ()
        if isinstance(prompt, ImagePrompt):
            images = prompt.images
            prompt = prompt.prompt
        if self.tokenizer is None:
            wants = {"a text prompt": isinstance(prompt, str), "stop": bool(params.stop)}
            wants["thinking_budget"] = params.thinking_budget is not None
            for what, wanted in wants.items():
                if wanted:
                    raise RequestError(f"{what} needs a tokenizer, and the engine has none")
        try:
            if isinstance(prompt, str):
                assert self.tokenizer is not None
                prompt.encode()  # Half a surrogate pair is no text.
                prompt = self.tokenizer.encode(prompt)
            ids = np.asarray(prompt)
        except ValueError as error:
            raise RequestError(f"the prompt is no text or list of token ids: {error}") from None
        if ids.ndim != 1 or not len(ids) or not np.issubdtype(ids.dtype, np.integer):
            raise RequestError("the prompt must be a text or a list of token ids, and not empty")
        wrong = ids[(ids < 0) | (ids >= self.cfg.vocab_size)]
        if wrong.size:
            raise RequestError(
                f"token id {wrong[0]} is not in the vocabulary of {self.cfg.vocab_size}"
            )
        ids, placed = self._with_images(ids, images)
        if len(ids) + params.max_tokens > self.max_length:
            raise RequestError(
                f"a prompt of {len(ids)} tokens and max_tokens={params.max_tokens} exceed the "
                f"engine's {self.max_length} tokens; shorten one of them"
            )
        if params.n > MAX_SAMPLES:
            raise RequestError(f"n must be at most {MAX_SAMPLES}, got {params.n}")
        return ids.astype(np.int32), placed

    def _with_images(
        self, ids: np.ndarray, images: Sequence[Image]
    ) -> tuple[np.ndarray, list[tuple[range, Image]]]:
        """The ids with image tokens repeated."""
        if self.cfg.vision is None:
            if images:
                raise RequestError("this model has no vision half; leave the images out")
            return ids, []
        try:
            ids, places = expand_images(ids, images, self.cfg.vision)
        except ImageError as error:
            raise RequestError(str(error)) from None
        return ids, list(zip(places, images, strict=True))


class _Drawn:
    """A burst on the host."""

    def __init__(self, words: np.ndarray, top_ids: Any, top_logprobs: Any) -> None:
        self.words, self._top_ids, self._top_logprobs = words, top_ids, top_logprobs

    def logprobs(
        self, row: int, ids: list[int], params: SamplingParams
    ) -> list[TokenLogprob] | None:
        """Of the row's tokens, as the request wants them."""
        if params.logprobs is None:
            return None
        own = self.words[row, 2 + BURST : 2 + BURST + len(ids)].view(np.float32).tolist()
        tops: list[list[tuple[int, float]]] = [[] for _ in ids]
        if params.logprobs:
            some = np.s_[: len(ids), row, : params.logprobs]
            pairs = zip(
                self._top_ids[some].tolist(), self._top_logprobs[some].tolist(), strict=True
            )
            tops = [list(zip(*pair, strict=True)) for pair in pairs]
        return [TokenLogprob(*one) for one in zip(ids, own, tops, strict=True)]


def _widths(slots: int) -> list[int]:
    """Rows of the decode programs, ascending, the last as many as there are slots.

    Each at most twice the one before on a CPU, where idle rows cost as much as others. Elsewhere
    they read next to nothing, and programs take longer to compile: four times.
    """
    step = 2 if dispatch.target().platform == "cpu" else 4
    widths, rows = [], MIN_ROWS
    while rows < slots:
        widths.append(rows)
        rows *= step
    return [*widths, slots]


def _table_widths(most: int, page_size: int) -> list[int]:
    """Pages of the tables of decode programs, ascending."""
    if dispatch.target().platform == "cpu":
        return [most]
    widths = (-(-tokens // page_size) for tokens in TABLE_TOKENS)
    return [*(width for width in widths if width < most), most]


def _check_chunks(prefill_chunk: int, prefix_block: int) -> None:
    ratio = prefill_chunk // prefix_block
    if ratio < 1 or ratio & (ratio - 1) or ratio * prefix_block != prefill_chunk:
        raise ValueError(
            f"prefill_chunk {prefill_chunk} must be a power of two times "
            f"prefix_block {prefix_block}"
        )


def _like(state: nnx.State, expected: nnx.State) -> nnx.State:
    """The state in the dtypes of `expected`.

    Raises:
      ValueError: it has other parameters or shapes.
    """
    found, known = (
        {jax.tree_util.keystr(path): x for path, x in jax.tree.leaves_with_path(tree)}
        for tree in (state, expected)
    )
    for name in [*known, *found]:
        shapes = [tuple(tree[name].shape) if name in tree else None for tree in (found, known)]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"the parameters are of another architecture: {name} has the shape {shapes[0]}, "
                f"the engine's {shapes[1]}"
            )
    cast: nnx.State = jax.tree.map(
        lambda x, like: x if x.dtype == like.dtype else x.astype(like.dtype), state, expected
    )
    return cast


def _mesh_of(model: Decoder) -> Mesh | None:
    """The mesh that the parameters lie on; None for a single device."""
    sharding = jax.tree.leaves(nnx.state(model))[0].sharding
    if isinstance(sharding, NamedSharding) and sharding.mesh.size > 1:
        assert isinstance(sharding.mesh, Mesh)
        return sharding.mesh
    return None


def _device_of(model: Decoder) -> jax.Device:
    """A device of this process that the parameters lie on."""
    device: jax.Device = min(
        jax.tree.leaves(nnx.state(model))[0].sharding.addressable_devices, key=lambda d: d.id
    )
    return device


def _of_all(value: Any, mesh: Mesh | None) -> np.ndarray:
    """The arrays that the processes of a mesh have, in one, the first process's first."""
    if mesh is None or not mesh.is_multi_process:
        return np.asarray(value)[None]
    return np.asarray(multihost_utils.process_allgather(value))


def _unstacker(model: Decoder, mesh: Mesh | None, int8_experts: bool) -> Any:
    """A function from the state of a stacked decoder to the structure and state of the engine's."""
    structure = nnx.graphdef(model)
    deep = model.cfg.num_layers > UNROLLED_LAYERS
    fused = mesh is None and dispatch.target().platform == "gpu"

    def served(state: nnx.State) -> Decoder:
        decoder = nnx.merge(structure, state)
        decoder = decoder if deep else decoder.unstacked()
        decoder = decoder.with_fused_projections() if fused and not deep else decoder
        return decoder.with_int8_experts() if int8_experts else decoder

    flat, shapes = nnx.split(nnx.eval_shape(served, nnx.state(model)))
    where = None if mesh is None else param_shardings(shapes, mesh, SERVING_RULES)
    if deep and not int8_experts:
        return lambda state: (structure, state if where is None else jax.device_put(state, where))
    stacked = None if mesh is None else param_shardings(nnx.state(model), mesh)
    compiled = jax.jit(lambda state: nnx.state(served(state)), out_shardings=where)

    def run(state: nnx.State) -> tuple[Any, nnx.State]:
        return flat, compiled(state if stacked is None else jax.device_put(state, stacked))

    return run


def _affordable_pages(cfg: Any, page_size: int, device: jax.Device) -> int:
    """KV pages that fit the memory of a device, or of all of a mesh's `model` axis."""
    stats = device.memory_stats() or {}
    free = stats.get("bytes_limit", 0) - stats.get("bytes_in_use", 0)
    budget = KV_SHARE * free if stats.get("bytes_limit") else CPU_KV_BYTES
    layers = cfg.kinds.count("softmax")
    token = 2 * layers * cfg.num_kv_heads * cfg.head_dim * np.dtype(cfg.dtype).itemsize
    return max(int(budget // max(token * page_size, 1)), 1)
