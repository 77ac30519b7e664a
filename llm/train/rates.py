"""How fast and how much: the learning rate and the size of the global batch of every step. Steps count from 1."""

from __future__ import annotations

import math

import msgspec

from llm.utils.config import ConfigError, TrainConfig


def learning_rate(step: int, config: TrainConfig) -> float:
    """Rate of update ``step``: a linear warm-up to ``lr``, then as ``schedule`` says down to ``lr x min_lr_ratio``.

    cosine and linear fall until the last step, wsd (warm-up, stable, decay: Hu et al., "MiniCPM", 2024) in a line over
    the last ``decay_steps``. It depends on nothing but the step and the config, so a run that is given more steps goes
    on as if it had had them from the start.
    """
    if step <= config.warmup_steps:
        return config.lr * step / config.warmup_steps
    end = last_step(config)
    begin = end - config.decay_steps if config.schedule == "wsd" else config.warmup_steps
    done = min(1.0, max(0, step - begin) / max(1, end - begin))
    floor = config.lr * config.min_lr_ratio
    if config.schedule == "constant":
        return config.lr
    if config.schedule == "cosine":
        return floor + (config.lr - floor) * 0.5 * (1 + math.cos(math.pi * done))
    return config.lr + (floor - config.lr) * done


def global_batch(step: int, config: TrainConfig) -> int:
    """Sequences of ``step``: from ``first_batch_size`` evenly up to ``global_batch_size`` after ``batch_warmup_steps``,
    in multiples of the first (McCandlish et al., "An empirical model of large-batch training", 2018, for the reason).
    """
    first = config.first_batch_size
    if first is None or step > config.batch_warmup_steps:
        return config.global_batch_size
    grown = config.global_batch_size // first - 1  # how often it grows
    return first * (1 + (step - 1) * grown // config.batch_warmup_steps)


def samples_after(step: int, config: TrainConfig) -> int:
    """Sequences of all steps up to and with ``step``."""
    first = config.first_batch_size
    if first is None:
        return step * config.global_batch_size
    warmup, grown = config.batch_warmup_steps, config.global_batch_size // first - 1
    total = max(0, step - warmup) * config.global_batch_size
    for multiple in range(grown) if grown else []:
        # It is that of the steps with multiple x warmup / grown <= step - 1 < (multiple + 1) x warmup / grown.
        begin, end = -(-multiple * warmup // grown), -(-(multiple + 1) * warmup // grown)
        total += (min(end, step) - min(begin, step)) * first * (multiple + 1)
    return total if grown else step * config.global_batch_size


def last_step(config: TrainConfig) -> int:
    """The step that ends the run: ``max_steps``, or the first one with ``max_tokens`` behind it."""
    if config.max_tokens is None:
        return config.max_steps
    return step_with(-(-config.max_tokens // config.seq_len), config)


def step_with(samples: int, config: TrainConfig) -> int:
    """The first step with so many sequences behind it, ``max_steps`` at most."""
    low, high = 1, config.max_steps
    while low < high:
        middle = (low + high) // 2
        if samples_after(middle, config) >= samples:
            high = middle
        else:
            low = middle + 1
    return low


def as_long_as_data(config: TrainConfig, samples: int) -> TrainConfig:
    """``config`` with no more steps than ``samples`` sequences are enough for, so that schedules end with the data.

    Raises ConfigError where these steps are fewer than the schedule needs.
    """
    if samples >= samples_after(config.max_steps, config):
        return config
    steps, needed = step_with(samples, config), config.warmup_steps + config.decay_steps
    if steps < needed:
        raise ConfigError(
            f"data.epochs: the data ends after {samples} samples, which are {steps} steps, fewer than "
            f"train.warmup_steps + decay_steps = {needed}: lower these or raise data.epochs"
        )
    return msgspec.structs.replace(config, max_steps=steps)
