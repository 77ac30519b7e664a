"""How often to save: what saves cost against what interruptions lose (Young, 1974; Daly, 2006)."""

from __future__ import annotations

from dataclasses import dataclass

from llm.train.schedule import young_daly

# Where nothing was measured. 419 unexpected interruptions of 2,048 nodes in 54 days: Llama Team, "The Llama 3 Herd of
# Models", 2024, section 3.3.4.
NODE_S = 2048 * 54 * 86400 / 419  # seconds of a node from one interruption to the next
STAGING = 10e9  # bytes per second of a node, from its devices to its memory: training waits for it
WRITING = 1e9  # and from there to the store: training goes on


@dataclass(frozen=True)
class Measured:
    """What an earlier run tells: ``stall_s`` and ``save_s`` of a usual save of ``bytes`` by ``nodes``, None where it
    has saved nothing; and ``interruptions`` that came without a save, in ``node_s`` seconds of a node."""

    run: str
    stall_s: float | None
    save_s: float | None
    bytes: float
    nodes: int
    interruptions: int
    node_s: float


@dataclass(frozen=True)
class Saving:
    """Seconds. ``lost`` is the share of the time that goes into saves and into work that is done again."""

    stall_s: float  # that a save holds the training up
    save_s: float  # from its beginning until it counts
    between_s: float  # from one interruption to the next
    every_s: float  # between saves, so that least is lost
    cost_from: str  # where the first two are from
    between_from: str

    @property
    def lost(self) -> float:
        """A save in flight does not count yet: an interruption also loses the time that it takes."""
        return self.stall_s / self.every_s + (self.every_s / 2 + self.save_s) / self.between_s


def saving(checkpoint_bytes: float, nodes: int, measured: Measured | None = None) -> Saving:
    """Of a run on ``nodes`` nodes; what an earlier run measured is scaled by the bytes that a node saves."""
    share = checkpoint_bytes / nodes
    stall, save, source = (
        share / STAGING,
        share / WRITING,
        "assumed: 10 GB/s of a node to its memory, 1 GB/s to the store",
    )
    node_s, between = NODE_S, "assumed: one in 6,300 node-hours, as in the training of Llama 3"
    if measured is not None and measured.stall_s is not None and measured.save_s is not None:
        factor = share / (measured.bytes / measured.nodes)
        stall, save, source = measured.stall_s * factor, measured.save_s * factor, f"from saves of {measured.run}"
    if measured is not None:
        # What is usual counts as one interruption more: a run that had none so far is not safe for ever.
        node_s = (measured.node_s + NODE_S) / (measured.interruptions + 1)
        hours = f"{measured.node_s / 3600:,.3g}"
        between = f"from {measured.interruptions} in {hours} node-hours of {measured.run}, and what is usual"
    every = max(young_daly(stall, node_s / nodes), save)  # one save at a time
    return Saving(stall, save, node_s / nodes, every, source, between)
