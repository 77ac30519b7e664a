"""The training loop: one attempt at a run, on one rank."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from llm.checkpoint.format import Commit
from llm.data.order import Picks, Position
from llm.data.reading import Rows, Share
from llm.data.streaming import Stream
from llm.train import base
from llm.train.checkpoint import Checkpointer, Event
from llm.train.control import EXIT_STOPPED, Control
from llm.train.dist import Layout
from llm.train.ema import MovingAverage
from llm.train.evaluate import held_out_loss, samples
from llm.train.exporter import Exporter
from llm.train.guard import Guard, take
from llm.train.logging import Metrics
from llm.train.lora import trained
from llm.train.optim import build, clip_coefficient
from llm.train.phases import Phases
from llm.train.progress import Progress, check_identity, config_digest
from llm.train.rates import as_long_as_data, global_batch, last_step, learning_rate, samples_after
from llm.train.schedule import SaveSchedule
from llm.train.sinks import Sinks
from llm.train.step import Passes
from llm.train.throughput import Throughput, gpu_memory
from llm.train.tracing import Trace
from llm.utils.config import TrainingConfig
from llm.utils.profiling import Profiler
from llm.utils.reproducibility import note, record
from llm.utils.storage import Storage


class Trainer:
    """The state of an attempt, and what changes it."""

    def __init__(
        self,
        config: TrainingConfig,
        layout: Layout,
        storage: Storage,
        control: Control,
        metrics: Metrics,
        checkpointer: Checkpointer,
        exporter: Exporter,
        sinks: Sinks,
    ) -> None:
        self.config, self.layout, self.world, self.storage = config, layout, layout.world, storage
        self.control, self.metrics, self.checkpointer, self.exporter = control, metrics, checkpointer, exporter
        self.sinks = sinks
        train, rank, device = config.train, self.world.rank, self.world.device
        trace = Trace(storage, checkpointer.attempt, rank) if config.logging.trace else None
        self.phases = Phases(device, trace, config.profile.nvtx)
        self.profiler = Profiler(config.profile, rank, device, storage, checkpointer.attempt)
        share = Share(layout.dp_rank, layout.dp)
        self.stream = Stream(config, share, lambda step: samples_after(step - 1, train))
        self.train = as_long_as_data(train, self.stream.order.end(samples_after(train.max_steps, train)))
        self.throughput = Throughput(config.model, train, self.world.size, device, config.lora)
        self.passes = Passes(config, layout)
        parameters = trained(self.passes.named_parameters())
        self.optimizer = build(parameters, train, config.model)
        self.average = MovingAverage(parameters, train.ema_decay) if train.ema_decay else None
        self.guard = Guard(train)
        self.last_step = last_step(self.train)
        self.progress = Progress()
        self.base: dict[str, Any] | None = None  # of adapters: which frozen weights they belong to
        self.over = False  # there is no time left for another step, as rank 0 has said, or no data
        self.schedule = SaveSchedule(config.checkpoint, storage, rank)
        self.part_failed = False  # this rank could not write its part of the save in flight
        self.stalled_s = 0.0  # in which saves held this attempt up so far
        self.save_wanted = False  # rank 0 has said so: the clock, or somebody, asks for a checkpoint
        self.saved: Commit | None = None  # what holds the state after ``step``, or before it
        # On rank 0: its commit has it. Other ranks' hardware is taken to be the same.
        self.made_by = record(layout.sizes(), device, checkpointer.code) if rank == 0 else {}
        checkpointer.mesh = {"ranks": self.world.size, **layout.sizes()}
        checkpointer.attach(self.tensors())

    def tensors(self) -> dict[str, Tensor]:
        """All that a checkpoint holds, by canonical name."""
        averages = {} if self.average is None else self.average.state()
        return {**self.optimizer.state(), **averages}

    def start(self, resume: Commit | None) -> None:
        """Take the state of ``resume``, or the very first one."""
        frozen = self.config.lora.rank > 0
        if resume is None or frozen:
            base.fill(self.config, self.passes.named_parameters())
        self.base = base.identity(self.config, base.own(self.passes), self.world) if frozen else None
        if resume is not None:
            self.saved, state = self.checkpointer.load_newest(resume)
            self.restore(state)
            self.over = self.stream.order.over(self.position())
            return
        if self.average is not None:
            self.average.start()

    # --- the run ---------------------------------------------------------------------------------------------------

    def run(self) -> int:
        """Train to the last step or to a stop request; returns the exit code."""
        stop = self.world.any(self.control.stop_requested())
        if not stop and self.due():  # a stop request had cut it short
            stop = self.evaluate()
        data = self.data()
        while not self.done() and not stop:
            before = self.progress.step
            self.phases.show_to_profiler(self.profiler.wants(before + 1))
            with self.profiler.step(before + 1), self.profiler.memory():
                stop = self.train_step(data)
            if self.progress.step < before:  # rolled back
                data = self.data()
                continue
            if not stop and self.due():
                stop = self.evaluate()
            last = self.done() and not stop
            if last or self.save_wanted or self.schedule.due_by_step(self.progress.step):
                self.save(wait=last or not self.config.checkpoint.asynchronous)
            elif self.schedule.snapshot_due(self.progress.step):
                self.snapshot()
        return self.leave() if stop else self.finish()

    def done(self) -> bool:
        """Is there no step left?"""
        return self.over or self.progress.step >= self.last_step

    def position(self) -> Position:
        """Where in the stream the run is."""
        return Position(self.progress.samples, self.progress.counts)

    def data(self) -> Iterator[tuple[Picks, Rows]]:
        """What every global batch to come is made of, and this rank's rows of it."""
        return self.stream.batches(self.coming())

    def coming(self) -> Iterator[Picks]:
        """Every global batch to come."""
        position, left_out = self.position(), list(self.guard.left_out)
        for step in range(self.progress.step + 1, self.last_step + 1):
            picks = self.stream.order.take(
                position, take(position.samples, global_batch(step, self.config.train), left_out)
            )
            yield picks
            if picks.over:
                return
            position = picks.after

    def train_step(self, data: Iterator[tuple[Picks, Rows]]) -> bool:
        """One step on this rank's rows of the next global batch. Returns whether to stop."""
        began = time.perf_counter()
        with self.phases("data"):
            picks, rows = next(data)
        train, world, progress = self.config.train, self.world, self.progress
        step = progress.step + 1
        size = global_batch(step, train)
        positions = size * train.seq_len
        sums = self.passes.train(rows, positions, self.phases)

        with self.phases("optimizer"), torch.no_grad():
            # The step's one small reduction: the loss, the norm for clipping, and what the others must know.
            hours_left = train.max_hours is None or progress.trained_s < train.max_hours * 3600
            flags = [
                self.control.stop_requested(),
                self.schedule.due_by_clock() or self.checkpointer.wanted,
                self.part_failed,
                world.rank == 0 and not hours_left,
            ]
            mine = torch.tensor([self.passes.tokens(rows), *flags], dtype=torch.float64, device=world.device)
            total = world.sum(torch.cat((sums[1:].double(), self.passes.norm_squares().view(1), mine)))
            loss, squares, tokens, stops, saves, failures, over = total.tolist()
            self.save_wanted, self.over = bool(saves), bool(over) or picks.over
            # Gradients are those of the sum over ``positions``, of which only ``tokens`` count.
            share = positions / max(tokens, 1)
            loss, norm = loss / max(tokens, 1), squares**0.5 * share
            verdict = self.guard.judge(step, loss, norm)
            lr = learning_rate(step, self.train)
            if verdict == "go":
                if (coefficient := share * clip_coefficient(norm, train.grad_clip)) != 1:
                    torch._foreach_mul_(self.optimizer.gradients(), coefficient)
                self.checkpointer.fence()
                self.optimizer.step(lr)
                progress.updates += 1
                if self.average is not None:
                    self.average.update()
            self.optimizer.zero_grad()
        if failures and world.rank == 0:
            self.checkpointer.abandon("another rank could not write its part: its log says why")
        self.part_failed = False
        if verdict == "stop":
            raise FloatingPointError(self.refusal(step, loss, norm))
        if verdict == "rollback":
            self.roll_back(step, loss, norm, take(progress.samples, size, self.guard.left_out))
            return bool(stops)
        seconds = time.perf_counter() - began
        progress.step, progress.samples, progress.counts = step, picks.after.samples, picks.after.counts
        progress.loss = loss if verdict == "go" else progress.loss
        progress.tokens += positions
        progress.trained_s += seconds
        self.control.heartbeat("train", step)
        self.report(loss, norm, lr, positions, tokens / positions, seconds, skipped=verdict == "skip")
        self.note(self.checkpointer.poll())
        return bool(stops)

    def refusal(self, step: int, loss: float, norm: float) -> str:
        """Why the run ends at a step that was not made."""
        train, guard = self.config.train, self.guard
        what = f"step {step}: loss {loss}, gradient norm {norm}; nothing was updated"
        if guard.in_a_row > train.max_skips:
            return f"{what}, and {guard.in_a_row} steps in a row were not good (train.max_skips={train.max_skips})"
        return (
            f"{what}. Lower train.lr (now {train.lr}), resume from an earlier checkpoint, or set "
            "train.on_nonfinite=rollback"
        )

    def roll_back(self, step: int, loss: float, norm: float, ranges: list[tuple[int, int]]) -> None:
        """Go back to the last commit, leave the sequences ``ranges`` out from now on, and commit that."""
        self.note(self.checkpointer.wait())
        chain = self.checkpointer.chain
        path = self.world.bytes_from_first(chain[-1].path.encode() if chain else b"").decode()
        if not path:
            raise FloatingPointError(f"{self.refusal(step, loss, norm)}; there is no commit to roll back to")
        self.saved, state = self.checkpointer.load_newest(Commit.parse(path))
        evaluated = self.progress.evaluated, self.progress.evaluation_loss
        self.progress = Progress.of(state)
        self.progress.evaluated, self.progress.evaluation_loss = evaluated
        self.optimizer.steps = self.progress.updates
        self.guard.after_rollback(state["guard"])
        self.guard.leave_out(ranges)
        text = ", ".join(f"{first}-{last - 1}" for first, last in ranges)
        self.metrics.write("phase", phase="rolled_back", step=step, to=self.progress.step, left_out=ranges)
        if self.world.rank == 0:
            print(
                f"warning: step {step}: loss {loss}, gradient norm {norm}; back to step {self.progress.step}, "
                f"without sequences {text}",
                flush=True,
            )
        self.save(wait=True)  # so that no attempt walks into the same data again

    def due(self) -> bool:
        """Is the held-out loss wanted after this step, and not there yet?"""
        step, every = self.progress.step, self.config.eval.every_steps
        return step > max(0, self.progress.evaluated) and (self.done() or (every > 0 and step % every == 0))

    def evaluate(self) -> bool:
        """Held-out loss, of the moving average where there is one. A stop request cuts it short, to be done after
        resuming: returns whether there was one."""
        averaged = contextlib.nullcontext() if self.average is None else self.average.swapped()
        if self.average is not None:
            self.checkpointer.fence()
        with averaged, self.phases("evaluate"):
            found = held_out_loss(self.config, self.passes, self.stream, self.control)
        if found is None:
            return True
        self.progress.evaluated = self.progress.step
        if found.loss is not None:
            self.progress.evaluation_loss = found.loss
            several = len(found.sources) > 1
            values = {
                "loss": found.loss,
                **({f"loss/{name}": each for name, each in found.sources.items()} if several else {}),
            }
            self.exporter.evaluated(found.loss)
            self.metrics.write("eval", step=self.progress.step, **values)
            self.sinks.write("eval", self.progress.step, **values)
            if self.world.rank == 0:
                parts = "".join(f"  {name} {each:.4f}" for name, each in found.sources.items()) if several else ""
                print(f"step {self.progress.step:>7}  held-out loss {found.loss:.4f}{parts}", flush=True)
        return False

    def report(
        self, loss: float, norm: float, lr: float, tokens: int, counted: float, seconds: float, skipped: bool
    ) -> None:
        """The step's line in the metrics and in the log. What it says of a save is of the one before the step.

        ``counted`` is the share of the ``tokens`` that the loss is the mean of: not padding, nor a prompt, nor the
        first token of a document.
        """
        step, every = self.progress.step, self.config.train.log_every
        mfu = self.throughput.mfu(tokens / seconds)
        parts = self.phases.take(step)
        self.exporter.stepped(step, loss, norm, lr, tokens, seconds, parts.get("data_s", 0.0), mfu)
        if self.control.first_step == step:
            self.metrics.write("phase", phase="first_step", step=step)
        if self.world.rank or (step % every and not self.done() and not skipped):
            return
        memory = gpu_memory(self.world.device)
        numbers = {
            "loss": loss,
            "lr": lr,
            "grad_norm": norm,
            "tokens": self.progress.tokens,
            "counted": counted,
            **{f"epoch/{name}": done for name, done in self.stream.epochs(self.position()).items()},
            "tokens_per_s": tokens / seconds,
            "step_s": seconds,
            "mfu": mfu,
            "gpu_bytes": None if memory is None else memory["peak"],
            **parts,
        }
        self.metrics.write("step", step=step, **numbers, **({"skipped": True} if skipped else {}))
        self.sinks.write("step", step, **numbers)
        rate = f"step {step:>7}  loss {loss:.4f}  norm {norm:.3f}  lr {lr:.2e}  {tokens / seconds:,.0f} tok/s"
        print(f"{rate}  update skipped" if skipped else rate, flush=True)

    # --- state -----------------------------------------------------------------------------------------------------

    def save(self, wait: bool) -> Commit:
        """Begin to commit the state after this step, and with it the metrics up to here; ``wait`` until it counts."""
        self.control.heartbeat("save")
        began = time.perf_counter()
        with self.phases("stall"):
            files = self.metrics.hand_over() if self.world.rank == 0 else None
            commit = self.checkpointer.save(self.progress.step, self.record(), files)
        self.save_wanted = False
        self.schedule.saved(self.checkpointer.blocked_s)
        blocked, waited = self.checkpointer.blocked_s, self.checkpointer.waited_s
        self.stalled_s += time.perf_counter() - began
        self.exporter.stalled(self.stalled_s)
        stall = {"seconds": blocked, "waited_s": waited, "stall_s": self.stalled_s}
        self.metrics.write("phase", phase="staged", step=self.progress.step, **stall)
        if wait:
            self.control.heartbeat("commit")
            began = time.perf_counter()
            with self.phases("stall"):
                events = self.checkpointer.wait()
            self.stalled_s += time.perf_counter() - began
            self.exporter.stalled(self.stalled_s)
            self.note(events)
        self.saved = commit
        return commit

    def snapshot(self) -> None:
        """Keep the state after this step in memory, to be committed if a rank dies."""
        files = self.metrics.pending() if self.world.rank == 0 else None
        self.checkpointer.snapshot(self.progress.step, self.record(), files)
        if (pid := self.checkpointer.saver.writer_pid) is not None:
            self.control.rescuer(pid, self.config.checkpoint.save_seconds)

    def record(self) -> dict[str, Any]:
        """What a checkpoint holds beside tensors."""
        return {
            **self.progress.state(),
            "guard": self.guard.state(),
            "data": self.stream.identity(),
            "config_sha256": config_digest(self.config),
            "made_by": self.made_by,
            **({} if self.base is None else {"base": self.base}),
        }

    def note(self, events: list[Event]) -> None:
        """Put into metrics and log what became of saves. One that failed costs nothing but what it would have saved."""
        for event in events:
            if event.reason is not None:
                self.part_failed = True
                self.exporter.failed()
                self.metrics.write("phase", phase="save_failed", step=event.commit.step, reason=event.reason)
                print(f"warning: {event.commit.path} was not saved: {event.reason}", file=sys.stderr, flush=True)
            elif event.committed:
                self.metrics.committed()
                self.exporter.committed(event.seconds, event.bytes)
                step, took = event.commit.step, {"seconds": event.seconds, "bytes": event.bytes}
                self.metrics.write("phase", phase="saved", step=step, **took, stall_s=self.stalled_s)
                if event.seconds > self.config.checkpoint.save_seconds * 0.8:
                    print(
                        f"warning: saving took {event.seconds:.1f} s; a stop request leaves checkpoint.save_seconds="
                        f"{self.config.checkpoint.save_seconds:g}: raise it",
                        flush=True,
                    )
            if event.warning is not None:
                print(f"warning: {event.warning}", flush=True)

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from a commit's state. Raises ConfigError when its data position means nothing in this stream."""
        if "imported" in state and "data" not in state:  # of another program: it has no position in this text
            step = state["step"]
            updates = state["imported"]["values"].get("optimizer.step")
            self.progress.step, self.progress.updates = step, updates if isinstance(updates, int) else step
            self.optimizer.steps = self.progress.updates
            position = self.stream.order.position(samples_after(step, self.config.train))
            self.progress.samples, self.progress.counts = position.samples, position.counts
            if self.world.rank == 0:
                print(f"note: an imported checkpoint: the data goes on at batch {step} of this text", flush=True)
            return
        check_identity(self.stream.identity(), state["data"])
        if self.base is not None:
            base.check_base(self.base, state.get("base"))
        if state["config_sha256"] != config_digest(self.config) and self.world.rank == 0:
            print("note: the config differs from the one this checkpoint was saved with", flush=True)
        changed = note(state["made_by"], self.made_by) if self.config.train.deterministic else None
        if changed is not None and self.world.rank == 0:
            print(changed, flush=True)
        self.progress = Progress.of(state)
        self.guard.restore(state["guard"])
        self.optimizer.steps = self.progress.updates

    def leave(self) -> int:
        """A stop was requested: save unless this very state is saved already, say so, and stop."""
        if self.saved is None or self.saved.step != self.progress.step:
            self.save(wait=True)
        else:
            self.note(self.checkpointer.wait())
        assert self.saved is not None
        commit = self.saved
        self.metrics.write("phase", phase="stopped", step=self.progress.step)
        self.close()
        self.control.heartbeat("stopped")
        self.control.stopped(self.progress.step, commit.path)
        return EXIT_STOPPED

    def finish(self) -> int:
        """All steps are made and saved: write a few lines with the model, into the log and ``samples.txt``."""
        self.control.heartbeat("sample")
        page = samples(self.config, self.passes, self.stream.load_tokenizer())
        if page is not None and self.world.rank == 0:
            print(page, flush=True)
            self.storage.replace("samples.txt", page.encode())
        self.metrics.write("phase", phase="finished", step=self.progress.step)
        self.close()
        self.control.heartbeat("finished")
        return 0

    def close(self) -> None:
        """Write everything out."""
        self.metrics.close()
        self.sinks.close()
        self.phases.close()
        self.stream.close()
        self.checkpointer.close()
