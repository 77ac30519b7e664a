"""What a run will need and how long it may take, before it is submitted: estimates, from shapes and data sheets."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from llm.estimate.flops import flops_per_token
from llm.estimate.hardware import HardwareConfig
from llm.estimate.layouts import Layout, fitting, nearest
from llm.estimate.memory import Memory, checkpoint_bytes, memory
from llm.estimate.parameters import adapter_parameters, parameter_count
from llm.estimate.saving import Saving, saving
from llm.estimate.timing import StepTime, step_time
from llm.train.rates import last_step, samples_after
from llmops.config.schema import RunConfig, trains, world_size
from llmops.errors import UserError
from llmops.measured import measured
from llmops.runs.model import Run


@dataclass(frozen=True)
class Plan:
    """Of the built-in trainer's run. What depends on the hardware is None where that is not known."""

    ranks: int
    parameters: int
    trained: int  # of them, or of the adapters beside them
    flops_per_token: float
    memory: Memory  # of the rank that needs most
    checkpoint_bytes: float
    saving: Saving
    steps: int
    tokens: int  # of the whole run
    hardware: HardwareConfig | None
    time: StepTime | None
    tokens_per_step: int
    peak: float | None  # FLOP/s of a device in the run's precision

    @property
    def fits(self) -> bool:
        """Does a rank have the memory? True where the hardware is not known."""
        return self.hardware is None or self.memory.total <= self.hardware.usable_bytes

    @property
    def tokens_per_day(self) -> float | None:
        """Trained in 24 hours without an interruption."""
        return None if self.time is None else 86400 * self.tokens_per_step / self.time.total

    @property
    def mfu(self) -> float | None:
        """Share of the peak that the estimated time stands for."""
        if self.time is None or self.peak is None:
            return None
        return self.flops_per_token * self.tokens_per_step / self.time.total / (self.ranks * self.peak)

    @property
    def device_hours(self) -> float | None:
        """Hours of one device until the last step."""
        if self.tokens_per_day is None:
            return None
        return 24 * self.ranks * self.tokens / self.tokens_per_day

    @property
    def cost(self) -> float | None:
        """Of these hours, in the currency of hardware.price."""
        if self.device_hours is None or self.hardware is None or self.hardware.price is None:
            return None
        return self.device_hours * self.hardware.price

    def record(self) -> dict[str, Any]:
        """As plain values; bytes and seconds."""
        return {
            "ranks": self.ranks,
            "parameters": self.parameters,
            "trained": self.trained,
            "flops_per_token": self.flops_per_token,
            "memory": {**self.memory.kinds(), "total": self.memory.total},
            "usable_bytes": None if self.hardware is None else self.hardware.usable_bytes,
            "fits": self.fits,
            "checkpoint_bytes": self.checkpoint_bytes,
            "saving": {**asdict(self.saving), "lost": self.saving.lost},
            "steps": self.steps,
            "tokens": self.tokens,
            "hardware": None if self.hardware is None else self.hardware.name,
            "step_s": None if self.time is None else {**self.time.parts(), "total": self.time.total},
            "tokens_per_day": self.tokens_per_day,
            "mfu": self.mfu,
            "device_hours": self.device_hours,
            "cost": self.cost,
        }


def make(config: RunConfig, like: Run | None = None) -> Plan:
    """The plan of a checked configuration; what saves cost and how often runs are interrupted, as ``like`` was.

    Raises UserError for one's own program, of which nothing is known.
    """
    if not trains(config):
        raise UserError("llmops plan knows the built-in trainer alone: leave the command, or task, out")
    train, ranks = config.train, world_size(config)
    end, size = last_step(train), checkpoint_bytes(config.model, train, config.lora)
    hardware, peak = config.hardware, None
    if hardware is not None and train.float8 == "off":  # else there are two peaks
        peak = 1e12 * (hardware.bf16_tflops if train.dtype == "bfloat16" else hardware.fp32_tflops)
    return Plan(
        ranks=ranks,
        parameters=parameter_count(config.model),
        trained=adapter_parameters(config.model, config.lora) or parameter_count(config.model),
        flops_per_token=flops_per_token(config.model, train.seq_len, config.lora),
        memory=memory(config.model, train, config.dist, ranks, config.lora),
        checkpoint_bytes=size,
        saving=saving(size, config.cluster.nodes, None if like is None else measured(like)),
        steps=end,
        tokens=samples_after(end, train) * train.seq_len,
        hardware=hardware,
        time=None if hardware is None else step_time(config.model, train, config.dist, ranks, hardware, config.lora),
        tokens_per_step=train.global_batch_size * train.seq_len,
        peak=peak,
    )


def layouts(config: RunConfig) -> list[Layout]:
    """Every layout of this run's ranks that fits, the fastest first. Raises UserError where hardware is not known."""
    if config.hardware is None:
        raise UserError(
            "--search needs to know what the run will be on: add hardware=h100, or another of conf/hardware"
        )
    return fitting(config, world_size(config), config.hardware)


def check_fits(config: RunConfig) -> None:
    """Raise UserError where a rank's memory cannot hold its part; names the nearest layout that does."""
    if config.hardware is None or not trains(config):
        return
    needed, usable = (
        memory(config.model, config.train, config.dist, world_size(config), config.lora).total,
        config.hardware.usable_bytes,
    )
    if needed <= usable:
        return
    other = nearest(config, world_size(config), config.hardware)
    remedy = (
        f"set {other.overrides}"
        if other is not None
        else "no layout of so few ranks fits: take more, or a smaller model"
    )
    raise UserError(
        f"hardware={config.hardware.name}: a rank would need {needed / 1e9:.1f} GB and has {usable / 1e9:.1f} GB for "
        f"tensors; {remedy}"
    )
