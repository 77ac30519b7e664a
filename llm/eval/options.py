"""Options of an evaluation that cannot work: what can be said before anything is read or queued. Free of torch."""

from __future__ import annotations

from typing import Any

from llm.utils.config import ConfigError, EvalConfig, data_parallel


def check(config: Any, world_size: int) -> None:
    """Refuse what cannot be evaluated. ``config`` has the fields of ``EvaluationConfig``. Raises ConfigError."""
    check_tasks(config.eval)
    if config.follow and config.step != "every":
        raise ConfigError(f"follow=true and step={config.step}: a training is followed with step=every")
    dist = config.dist
    if dist.pp > 1 or dist.cp > 1:
        raise ConfigError(f"dist.pp={dist.pp}, dist.cp={dist.cp}: evaluations spread a model by dp_shard and tp alone")
    data_parallel(dist, world_size)


def check_tasks(config: EvalConfig) -> None:
    """The same for the tasks alone, which a training may name for the evaluations that follow it."""
    if not config.tasks or "" in config.tasks or len(set(config.tasks)) < len(config.tasks):
        raise ConfigError(f"eval.tasks=[{','.join(config.tasks)}]: name one task or more, and each only once")
    if "humaneval" in config.tasks and not config.run_code:
        raise ConfigError(
            "eval.tasks: humaneval runs programs that the model writes; set eval.run_code=true where that may happen, "
            "or leave it out"
        )
    if config.code_samples > 1 and config.code_temperature == 0:
        raise ConfigError(
            f"eval.code_samples={config.code_samples} of eval.code_temperature=0 are all the same: raise the second"
        )
    if not config.pass_at or max(config.pass_at) > config.code_samples:
        raise ConfigError(
            f"eval.pass_at={config.pass_at}: give numbers of at most eval.code_samples={config.code_samples}"
        )
