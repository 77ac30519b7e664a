"""Hydra's ``hydra/launcher=llmops``: the jobs of a multirun as the trials of one llmops study."""

from dataclasses import dataclass, field

from hydra.core.config_store import ConfigStore

from hydra_plugins.hydra_llmops_launcher.launcher import LlmopsLauncher

__all__ = ["LlmopsConf", "LlmopsLauncher"]


@dataclass
class LlmopsConf:
    """What ``hydra.launcher.*`` may set. Hydra imports this with every program that uses it: nothing heavy here."""

    _target_: str = "hydra_plugins.hydra_llmops_launcher.launcher.LlmopsLauncher"
    backend: str = "local"  # or slurm
    name: str | None = None  # of the study; null = the name of the program
    runs_url: str | None = None  # folder of all runs; null = as for llmops itself
    max_parallel: int | None = None  # jobs at a time
    wait: bool = True  # false = return once all is submitted; return values are None then
    poll_s: float = 5.0  # between two looks at the study
    # Further overrides of llmops' own configuration, such as cluster.partition=gpu
    overrides: list[str] = field(default_factory=list)


ConfigStore.instance().store(group="hydra/launcher", name="llmops", node=LlmopsConf, provider="llmops")
