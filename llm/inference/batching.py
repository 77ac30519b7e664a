"""Continuous batching (Yu et al., "Orca", 2022): requests join and leave a running batch at every step.

One thread owns the model. A step is one forward of the next token of every text that is being written, and of parts of
prompts in what room ``step_tokens`` leaves (Agrawal et al., "Sarathi-Serve", 2024), so that a long prompt holds up
nobody. Where the cache is full, the youngest request gives its blocks back, waits, and is computed again.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from llm.data.tokenizer import Tokenizer
from llm.inference.generate import Text, room
from llm.inference.paged import BLOCK, Blocks, PagedCache, Pool, Span
from llm.inference.sampling import Chosen, Row, Sampling, choose, tell
from llm.model.transformer import Transformer

Finish = Literal["stop", "length", "cancelled", "failed"]


class Busy(Exception):
    """The queue is full."""


@dataclass(eq=False)
class Request:
    """A text to continue; all but the two times that are there from the start is the engine's thread's own."""

    text: Text
    allowed: int  # tokens, at most
    tell_prompt: bool = False  # log-probabilities of the prompt's own tokens, too
    created: float = field(default_factory=time.monotonic)
    started: float | None = None  # when it was first taken into the batch
    tokens: list[int] = field(init=False)  # of the prompt, and those that were added
    blocks: list[int] = field(default_factory=list)
    computed: int = 0  # of the tokens, whose keys and values are there
    prompt_chosen: list[Chosen] = field(default_factory=list)  # from the prompt's second token on
    shown: int = 0  # characters of the text
    shared: int = 0  # tokens of the prompt that did not have to be computed

    def __post_init__(self) -> None:
        self.tokens = list(self.text.row.prompt)


@dataclass(frozen=True)
class Update:
    """What a step did to a request. ``text`` follows what was told before; no update follows one with ``finish``."""

    request: Request
    text: str = ""
    chosen: Chosen | None = None
    finish: Finish | None = None


class Engine:
    """A model with a paged cache, and a thread that serves requests from it until ``close``.

    ``deliver`` gets the updates of each step, on that thread. At most ``max_batch`` requests are computed together, and
    ``max_queue`` wait. When a step raises, that is ``failed``: all requests end so, and the engine with them.
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        deliver: Callable[[list[Update]], None],
        *,
        blocks: int,
        max_batch: int = 64,
        step_tokens: int = 512,
        max_queue: int = 256,
    ) -> None:
        weight = next(model.parameters())
        self.model, self.tokenizer, self.deliver = model, tokenizer, deliver
        self.device = weight.device
        self.blocks, self.pool = Blocks(blocks), Pool(model.config, blocks, weight.dtype, weight.device)
        self.max_batch, self.step_tokens, self.max_queue = max_batch, max(step_tokens, max_batch), max_queue
        self.limit = min(model.config.max_seq_len, blocks * BLOCK)  # positions of a request
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []  # the oldest first
        self.preemptions = 0
        self.failed: Exception | None = None
        self._cancelled: set[Request] = set()
        self._closed = False
        self._fresh: list[int] = []  # blocks with what another request left in them
        self._wake = threading.Condition()
        self._thread = threading.Thread(target=self._serve, name="engine", daemon=True)
        self._thread.start()

    def request(self, prompt: Sequence[int], sampling: Sampling, tell_prompt: bool = False) -> Request:
        """A request that can be submitted. Raises ValueError for a prompt that is empty or leaves no room."""
        allowed = room(0, prompt, sampling, self.limit)
        return Request(Text(Row(sampling, prompt), self.tokenizer), allowed, tell_prompt)

    def submit(self, requests: Sequence[Request]) -> None:
        """Queue all of them. Raises Busy where there is no room for all."""
        with self._wake:
            if self._closed or self.failed is not None:
                raise Busy("the engine has ended")
            if self.active + len(requests) > self.max_batch + self.max_queue:
                raise Busy(f"{len(self.waiting)} requests wait already")
            self.waiting.extend(requests)
            self._wake.notify()

    def cancel(self, requests: Sequence[Request]) -> None:
        """End those that have not ended, with an update that says so."""
        with self._wake:
            self._cancelled.update(requests)
            self._wake.notify()

    @property
    def active(self) -> int:
        """How many requests wait or run."""
        return len(self.waiting) + len(self.running)

    def close(self) -> None:
        """Cancel what there is, and end the thread."""
        with self._wake:
            self._closed = True
            self._wake.notify()
        self._thread.join()

    def _serve(self) -> None:
        try:
            while self._next():
                pass
        except Exception as error:  # noqa: BLE001 - told to whoever waits
            with self._wake:
                self.failed = error
            self._end_all("failed")
        else:
            self._end_all("cancelled")

    def _next(self) -> bool:
        """Wait for work, and do a step of it; False at the end."""
        with self._wake:
            while not (self.active or self._cancelled or self._closed):
                self._wake.wait()
            if self._closed:
                return False
            updates = self._drop_cancelled()
            work = self._plan()
        if work:
            updates += self._step(work)
        if updates:
            self.deliver(updates)
        return True

    def _end_all(self, finish: Finish) -> None:
        with self._wake:
            ended = [*self.running, *self.waiting]
            for request in self.running:
                self._leave(request)
            self.running, self.waiting = [], deque()
        if ended:
            self.deliver([Update(request, finish=finish) for request in ended])

    def _drop_cancelled(self) -> list[Update]:
        gone = [each for each in (*self.running, *self.waiting) if each in self._cancelled]
        self._cancelled.clear()
        for request in gone:
            if request in self.running:
                self.running.remove(request)
                self._leave(request)
            else:
                self.waiting.remove(request)
        return [Update(request, finish="cancelled") for request in gone]

    def _leave(self, request: Request) -> None:
        self.blocks.give(request.blocks)
        request.blocks, request.computed = [], 0

    def _plan(self) -> list[tuple[Request, int]]:
        """Who is computed in this step, and how many tokens of each."""
        work: list[tuple[Request, int]] = []
        for request in list(self.running):
            # Who is preempted here is younger than all that have their place in the plan.
            if request.blocks and len(request.tokens) - request.computed == 1 and self._grow(request):
                work.append((request, 1))  # noqa: PERF401 - running gets shorter meanwhile
        left = self.step_tokens - len(work)
        placed = {request for request, _ in work}
        for request in self.running:
            if request not in placed and (count := min(len(request.tokens) - request.computed, left)) > 0:
                work.append((request, count))
                left -= count
        while left > 0 and self.waiting and len(self.running) < self.max_batch and self._admit(self.waiting[0]):
            request = self.waiting.popleft()
            self.running.append(request)
            count = min(len(request.tokens) - request.computed, left)
            work.append((request, count))
            left -= count
        return work

    def _admit(self, request: Request) -> bool:
        """Blocks for all its tokens, with as many left as may be needed at once by those that run."""
        shared = [] if request.tell_prompt else self.blocks.shared(request.tokens)
        needed = -(-len(request.tokens) // BLOCK) - len(shared)
        if self.blocks.free < needed + len(self.running):
            self.blocks.give(shared)
            return False
        request.blocks, request.computed = shared, len(shared) * BLOCK
        for _ in range(needed):
            self._take(request)
        if request.started is None:
            request.started, request.shared = time.monotonic(), request.computed
        return True

    def _grow(self, request: Request) -> bool:
        """A block for its next token; False where it gave way itself."""
        while request.computed == len(request.blocks) * BLOCK:
            if self.blocks.free:
                self._take(request)
                continue
            youngest = self.running.pop()
            self._leave(youngest)
            self.waiting.appendleft(youngest)
            self.preemptions += 1
            if youngest is request:
                return False
        return True

    def _take(self, request: Request) -> None:
        block = self.blocks.take()
        assert block is not None  # that there is one free was looked at
        request.blocks.append(block)
        self._fresh.append(block)

    @torch.no_grad()
    def _step(self, work: Sequence[tuple[Request, int]]) -> list[Update]:
        self.pool.clear(self._fresh)
        self._fresh = []
        tokens: list[int] = []
        wanted: list[int] = []
        for request, count in work:
            tokens += request.tokens[request.computed : request.computed + count]
            if request.tell_prompt:
                wanted += range(len(tokens) - count, len(tokens) - 1)
            if request.tell_prompt or request.computed + count == len(request.tokens):
                wanted.append(len(tokens) - 1)
        cache = PagedCache(self.pool, [Span(request.blocks, request.computed, count) for request, count in work])
        logits = self.model(
            torch.tensor([tokens], device=self.device),
            positions=cache.positions,
            cache=cache,
            wanted=torch.tensor(wanted, dtype=torch.long, device=self.device),
        )
        return self._chosen(work, logits)

    def _chosen(self, work: Sequence[tuple[Request, int]], logits: Tensor) -> list[Update]:
        """The next tokens, where a request's are all computed, from the logits (N, V) of the wanted places."""
        ready: list[Request] = []
        places: list[int] = []
        at = 0
        for request, count in work:
            told = count if request.tell_prompt else int(request.computed + count == len(request.tokens))
            if request.tell_prompt:
                self._tell_prompt(request, logits[at : at + count])
            at += told
            self._computed(request, count)
            if request.computed == len(request.tokens):
                ready.append(request)
                places.append(at - 1)
        writing = [(request, place) for request, place in zip(ready, places, strict=True) if request.allowed]
        chosen: list[Chosen] = []
        if writing:
            rows = [request.text.row for request, _ in writing]
            chosen = choose(logits[[place for _, place in writing]], rows, self.tokenizer.vocab_size)
        updates = [self._add(request, each) for (request, _), each in zip(writing, chosen, strict=True)]
        updates += [Update(request, finish="length") for request in ready if not request.allowed]
        with self._wake:
            for update in updates:
                if update.finish:
                    self.running.remove(update.request)
                    self._leave(update.request)
        return updates

    def _computed(self, request: Request, count: int) -> None:
        full = request.computed // BLOCK
        request.computed += count
        for number in range(full, request.computed // BLOCK):
            self.blocks.name(request.blocks, number, request.tokens[number * BLOCK : (number + 1) * BLOCK])

    def _tell_prompt(self, request: Request, logits: Tensor) -> None:
        """Log-probabilities of the prompt's tokens from the logits (T, V) of the places that were just computed."""
        row = request.text.row
        done = len(request.prompt_chosen)
        known = done - request.computed  # told before it was preempted
        after = row.prompt[done + 1 : request.computed + logits.shape[0] + 1]
        if after:
            places = logits[known : known + len(after), : self.tokenizer.vocab_size]
            request.prompt_chosen += tell(places, after, [row] * len(after))

    def _add(self, request: Request, chosen: Chosen) -> Update:
        text = request.text
        text.add(chosen, request.allowed)
        request.tokens.append(chosen.token)
        fresh = text.completion.text[request.shown :]
        request.shown += len(fresh)
        return Update(request, fresh, chosen, text.completion.finish if text.done else None)
