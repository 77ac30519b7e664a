"""What the estimates have to know of a device and its neighbours."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

from llm.utils.config import PositiveFloat, PositiveInt, Struct


class HardwareConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One device of a kind, as its maker's data sheet has it; nodes as the maker's usual server has them.

    Rates are dense, in TFLOP/s, and ``float8_tflops`` is null where there are no such products; memory in GiB;
    bandwidths in GB/s, per device and in one direction. ``achievable`` is the share of a peak rate that large matrix
    products reach; ``price`` is of a device's hour, in any currency.
    """

    name: str
    memory_gib: PositiveFloat
    bf16_tflops: PositiveFloat
    fp32_tflops: PositiveFloat
    float8_tflops: PositiveFloat | None = None
    memory_gb_s: PositiveFloat
    intra_node_gb_s: PositiveFloat
    inter_node_gb_s: PositiveFloat
    gpus_per_node: PositiveInt
    achievable: Annotated[float, Meta(gt=0, le=1)] = 0.7
    price: PositiveFloat | None = None

    @property
    def usable_bytes(self) -> float:
        """Memory that tensors can take: the driver, the communicator's buffers and gaps between tensors need some."""
        return 0.92 * self.memory_gib * 2**30
