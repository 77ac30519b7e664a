"""The training loop, from a config to an exit code."""

from __future__ import annotations

import contextlib
import hashlib
import os
import sys
import time
from collections.abc import Iterator
from typing import Any

import msgspec
import torch
from torch import Tensor

from llm.checkpoint.format import Commit
from llm.data.source import load_text
from llm.data.streaming import Windows, batches, held_out_batches
from llm.data.tokenizer import load_tokenizer
from llm.inference.generate import generate
from llm.model.init import init_weights
from llm.model.transformer import Transformer
from llm.train.checkpoint import Checkpointer, Event
from llm.train.control import EXIT_STOPPED, Control
from llm.train.dist import World, shard
from llm.train.exporter import Exporter
from llm.train.logging import Metrics
from llm.train.optim import AdamW, clip_coefficient, learning_rate
from llm.train.schedule import SaveSchedule
from llm.train.throughput import Throughput, gpu_memory
from llm.utils.config import ConfigError, TrainingConfig
from llm.utils.storage import Storage


class Trainer:
    """One attempt at a run on one rank. ``step`` counts finished updates, and with them the global batches consumed."""

    def __init__(
        self,
        config: TrainingConfig,
        world: World,
        storage: Storage,
        control: Control,
        metrics: Metrics,
        checkpointer: Checkpointer,
        exporter: Exporter,
    ) -> None:
        self.config, self.world, self.storage, self.exporter = config, world, storage, exporter
        self.control, self.metrics, self.checkpointer = control, metrics, checkpointer
        self.dtype = getattr(torch, config.train.dtype)
        self.text = load_text(config.data.source, config.data.validation_fraction)
        train = config.train
        self.throughput = Throughput(config.model, train, world.size, world.device)
        self.windows = Windows(
            self.text.train, train.seq_len, train.global_batch_size, train.seed, world.rank, world.size
        )
        with torch.device("meta" if world.grouped else world.device):  # what will be sharded takes no memory before
            self.model = Transformer(config.model)
        if world.grouped:
            shard(self.model, self.model.blocks.values(), world, self.dtype)
            self.model.to_empty(device=world.device)
            self.model.tie()
        self.optimizer = AdamW(self.model, train)
        self.step = 0
        self.evaluated = -1  # the last step whose held-out loss is in the metrics
        self.loss: float | None = None
        self.evaluation_loss: float | None = None
        self.schedule = SaveSchedule(config.checkpoint, storage, world.rank)
        self.part_failed = False  # this rank could not write its part of the save in flight
        self.stalled_s = 0.0  # in which saves held this attempt up so far
        self.save_wanted = False  # rank 0 has said so: the clock, or somebody, asks for a checkpoint
        self.saved: Commit | None = None  # what holds the state after ``step``, or before it
        checkpointer.attach(self.optimizer.state())

    def start(self, resume: Commit | None) -> None:
        """Take the state of ``resume``, or the very first one."""
        if resume is None:
            init_weights(self.model, self.config.train.seed, self.config.model.n_layers)
        else:
            self.saved, state = self.checkpointer.load_newest(resume)
            self.restore(state)

    # --- the run ---------------------------------------------------------------------------------------------------

    def run(self) -> int:
        """Train to the last step or to a stop request; returns the exit code."""
        steps = self.config.train.max_steps
        stop = self.world.any(self.control.stop_requested())
        if not stop and self.due(self.config.eval.every_steps):  # a stop request had cut it short
            stop = self.evaluate()
        data = batches(self.windows, self.step, steps, self.config.data.num_workers)
        while self.step < steps and not stop:
            stop = self.train_step(data)
            if not stop and self.due(self.config.eval.every_steps):
                stop = self.evaluate()
            last = self.step == steps and not stop
            if last or self.save_wanted or self.schedule.due_by_step(self.step):
                self.save(wait=last or not self.config.checkpoint.asynchronous)
            elif self.schedule.snapshot_due(self.step):
                self.snapshot()
        if stop:
            return self.leave()
        self.print_samples()
        self.metrics.write("phase", phase="finished", step=self.step)
        self.metrics.close()
        self.checkpointer.close()
        self.control.heartbeat("finished")
        return 0

    def train_step(self, data: Iterator[Tensor]) -> bool:
        """One update from this rank's rows (R, seq_len + 1) of the next global batch. Returns whether to stop."""
        began = time.perf_counter()
        rows = next(data)
        data_s = time.perf_counter() - began
        config, world = self.config.train, self.world
        global_tokens = config.global_batch_size * config.seq_len
        loss_sum = torch.zeros((), device=world.device)
        for micro in torch.split(rows, config.micro_batch_size):
            micro_sum = self.loss_sum(micro)
            # FSDP averages gradients over ranks, and the loss is the mean over the tokens of all of them. Gradients are
            # reduced after every micro-batch: holding them back would need a whole unsharded copy.
            (micro_sum[0] * (world.size / global_tokens)).backward()  # type: ignore[no-untyped-call]
            loss_sum += micro_sum[1].detach()

        with torch.no_grad():
            gradients = self.optimizer.gradients()
            squares = torch.stack([grad.square().sum(dtype=torch.float64) for grad in gradients]).sum()
            # The step's one small reduction: the loss, the norm for clipping, and what the others must know.
            flags = [
                self.control.stop_requested(),
                self.schedule.due_by_clock() or self.checkpointer.wanted,
                self.part_failed,
            ]
            mine = torch.tensor([rows.shape[0] * config.seq_len, *flags], dtype=torch.float64)
            total = world.sum(torch.cat((torch.stack((loss_sum.double(), squares)), mine.to(world.device))))
            loss, squares_sum, tokens, stops, saves, failures = total.tolist()
            self.save_wanted = bool(saves)
            loss, norm = loss / tokens, squares_sum**0.5
            if not torch.isfinite(total).all():
                raise FloatingPointError(
                    f"step {self.step + 1}: loss {loss}, gradient norm {norm}; nothing was updated. Lower train.lr "
                    f"(now {config.lr}) or resume from an earlier checkpoint"
                )
            if (coefficient := clip_coefficient(norm, config.grad_clip)) < 1:
                torch._foreach_mul_(gradients, coefficient)
            lr = learning_rate(self.step + 1, config)
            self.checkpointer.fence()
            self.optimizer.step(lr)
        self.optimizer.zero_grad()
        self.step += 1
        self.loss = loss
        self.control.heartbeat("train", self.step)
        self.report(loss, norm, lr, time.perf_counter() - began, data_s)
        if failures and world.rank == 0:
            self.checkpointer.abandon("another rank could not write its part: its log says why")
        self.part_failed = False
        self.note(self.checkpointer.poll())
        return bool(stops)

    def loss_sum(self, rows: Tensor) -> Tensor:
        """Losses of every next token of rows (R, T + 1) of token ids, summed, as the model's head gives them."""
        rows = rows.to(self.world.device, dtype=torch.int64)
        return self.in_precision(rows[:, :-1], rows[:, 1:])

    def in_precision(self, *inputs: Tensor) -> Tensor:
        """The model in its training precision: FSDP casts by itself, a plain model needs autocast."""
        if self.world.grouped or self.dtype == torch.float32:
            return self.model(*inputs)  # type: ignore[no-any-return]
        with torch.autocast(self.world.device.type, dtype=self.dtype):
            return self.model(*inputs)  # type: ignore[no-any-return]

    def due(self, every: int) -> bool:
        """Is the held-out loss wanted after this step, and not there yet?"""
        last = self.step == self.config.train.max_steps
        return self.step != self.evaluated and self.step > 0 and (last or (every > 0 and self.step % every == 0))

    def evaluate(self) -> bool:
        """Held-out loss. A stop request cuts it short, to be done after resuming: returns whether there was one."""
        config, world = self.config, self.world
        total = torch.zeros(3, dtype=torch.float64, device=world.device)
        for rows in held_out_batches(
            self.text.held_out,
            config.train.seq_len,
            config.train.global_batch_size,
            config.eval.batches,
            world.rank,
            world.size,
        ):
            self.control.heartbeat("evaluate")
            with torch.no_grad():
                loss = sum(float(self.loss_sum(micro)[1]) for micro in torch.split(rows, config.train.micro_batch_size))
            mine = [loss, rows.shape[0] * config.train.seq_len, float(self.control.stop_requested())]
            total += world.sum(torch.tensor(mine, dtype=torch.float64, device=world.device))
            if total[2]:
                return True
        self.evaluated = self.step
        if world.rank == 0 and total[1]:
            value = self.evaluation_loss = float(total[0] / total[1])
            self.exporter.evaluated(value)
            self.metrics.write("eval", step=self.step, loss=value)
            print(f"step {self.step:>7}  held-out loss {value:.4f}", flush=True)
        return False

    def report(self, loss: float, norm: float, lr: float, seconds: float, data_s: float) -> None:
        """The step's line in the metrics and in the log."""
        config = self.config.train
        tokens = config.global_batch_size * config.seq_len
        mfu = self.throughput.mfu(tokens / seconds)
        self.exporter.stepped(self.step, loss, norm, lr, tokens, seconds, data_s, mfu)
        if self.control.first_step == self.step:
            self.metrics.write("phase", phase="first_step", step=self.step)
        if self.world.rank or (self.step % config.log_every and self.step != config.max_steps):
            return
        memory = gpu_memory(self.world.device)
        self.metrics.write(
            "step",
            step=self.step,
            loss=loss,
            lr=lr,
            grad_norm=norm,
            tokens=self.step * tokens,
            tokens_per_s=tokens / seconds,
            step_s=seconds,
            data_s=data_s,
            mfu=mfu,
            gpu_bytes=None if memory is None else memory["peak"],
        )
        print(
            f"step {self.step:>7}  loss {loss:.4f}  norm {norm:.3f}  lr {lr:.2e}  {tokens / seconds:,.0f} tok/s",
            flush=True,
        )

    # --- state -----------------------------------------------------------------------------------------------------

    def save(self, wait: bool) -> Commit:
        """Begin to commit the state after this step, and with it the metrics up to here; ``wait`` until it counts."""
        self.control.heartbeat("save")
        began = time.perf_counter()
        files = self.metrics.hand_over() if self.world.rank == 0 else None
        commit = self.checkpointer.save(self.step, self.record(), files)
        self.save_wanted = False
        self.schedule.saved(self.checkpointer.blocked_s)
        blocked, waited = self.checkpointer.blocked_s, self.checkpointer.waited_s
        self.stalled_s += time.perf_counter() - began
        self.exporter.stalled(self.stalled_s)
        stall = {"seconds": blocked, "waited_s": waited, "stall_s": self.stalled_s}
        self.metrics.write("phase", phase="staged", step=self.step, **stall)
        if wait:
            self.control.heartbeat("commit")
            began = time.perf_counter()
            events = self.checkpointer.wait()
            self.stalled_s += time.perf_counter() - began
            self.exporter.stalled(self.stalled_s)
            self.note(events)
        self.saved = commit
        return commit

    def snapshot(self) -> None:
        """Keep the state after this step in memory, to be committed if a rank dies."""
        files = self.metrics.pending() if self.world.rank == 0 else None
        self.checkpointer.snapshot(self.step, self.record(), files)
        if (pid := self.checkpointer.saver.writer_pid) is not None:
            self.control.rescuer(pid, self.config.checkpoint.save_seconds)

    def record(self) -> dict[str, Any]:
        """What a checkpoint holds beside tensors."""
        return {
            "step": self.step,
            "data_position": self.step,
            "tokens": self.step * self.config.train.global_batch_size * self.config.train.seq_len,
            "evaluated": self.evaluated,
            "loss": self.loss,
            "evaluation_loss": self.evaluation_loss,
            "data": self.data_identity(),
            "config_sha256": config_digest(self.config),
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
                self.metrics.write(
                    "phase",
                    phase="saved",
                    step=event.commit.step,
                    seconds=event.seconds,
                    bytes=event.bytes,
                    stall_s=self.stalled_s,
                )
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
            self.step = state["step"]
            steps = state["imported"]["values"].get("optimizer.step")
            self.optimizer.steps = steps if isinstance(steps, int) else self.step
            if self.world.rank == 0:
                print(f"note: an imported checkpoint: the data goes on at batch {self.step} of this text", flush=True)
            return
        mine, theirs = self.data_identity(), state["data"]
        if changed := [key for key in mine if mine[key] != theirs.get(key)]:
            changes = ", ".join(f"{key}: {theirs.get(key)} -> {mine[key]}" for key in changed)
            raise ConfigError(
                f"the checkpoint's data position belongs to other batches ({changes}): "
                "restore the values or start a new run"
            )
        if state["config_sha256"] != config_digest(self.config) and self.world.rank == 0:
            print("note: the config differs from the one this checkpoint was saved with", flush=True)
        self.step, self.loss = state["step"], state["loss"]
        self.evaluated, self.evaluation_loss = state["evaluated"], state["evaluation_loss"]
        self.optimizer.steps = self.step

    def data_identity(self) -> dict[str, Any]:
        """Everything that decides which tokens a global batch holds."""
        train = self.config.train
        return {
            "text": self.text.fingerprint,
            "train.seq_len": train.seq_len,
            "train.global_batch_size": train.global_batch_size,
            "train.seed": train.seed,
            "data.tokenizer": self.config.data.tokenizer,
            "data.validation_fraction": self.config.data.validation_fraction,
        }

    def leave(self) -> int:
        """A stop was requested: save unless this very state is saved already, say so, and stop."""
        if self.saved is None or self.saved.step != self.step:
            self.save(wait=True)
        else:
            self.note(self.checkpointer.wait())
        assert self.saved is not None
        commit = self.saved
        self.metrics.write("phase", phase="stopped", step=self.step)
        self.metrics.close()
        self.checkpointer.close()
        self.control.heartbeat("stopped")
        self.control.stopped(self.step, commit.path)
        return EXIT_STOPPED

    def print_samples(self) -> None:
        """Let the finished model write a few lines: in the log and in ``samples.txt``."""
        config = self.config.eval
        if not config.sample_prompts or not config.sample_tokens:
            return
        self.control.heartbeat("sample")
        texts = generate(
            self.in_precision,
            load_tokenizer(self.config.data.tokenizer),
            config.sample_prompts,
            config.sample_tokens,
            config.temperature,
            self.config.model.max_seq_len,
            torch.Generator().manual_seed(self.config.train.seed),
            self.world.device,
        )
        if self.world.rank == 0:
            page = "\n\n".join(texts) + "\n"
            print(page, flush=True)
            self.storage.replace("samples.txt", page.encode())


def config_digest(config: TrainingConfig) -> str:
    """SHA-256 of every value of the config."""
    return hashlib.sha256(msgspec.json.encode(config, order="sorted")).hexdigest()


def prepare(config: TrainingConfig) -> None:
    """Threads, seeds and determinism, before anything is computed."""
    torch.set_num_threads(config.train.threads_per_rank)
    with contextlib.suppress(RuntimeError):  # may be set only once in a process
        torch.set_num_interop_threads(1)
    torch.manual_seed(config.train.seed)
    if config.train.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        # Not use_deterministic_algorithms(): the same switch, but it imports the compiler's settings too.
        torch.set_deterministic_debug_mode("error")
        torch.backends.cudnn.benchmark = False
