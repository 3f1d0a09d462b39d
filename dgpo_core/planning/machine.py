"""What a machine can do: published figures of common GPUs, and which part of them is reached."""

from dataclasses import dataclass

from dgpo_core.errors import UserError

GIB = 2**30


@dataclass(frozen=True)
class Device:
    """`memory` in bytes; `flops` a second in dense bfloat16 and `bandwidth` of the memory in bytes a second,
    None where unknown (then no hours can be told)."""

    name: str
    memory: float
    flops: float | None = None
    bandwidth: float | None = None


MIB = 2**20
# Memory as nvidia-smi tells it; FLOPs (dense bfloat16, without sparsity) and bandwidth from the data sheets.
DEVICES = {
    device.name: device
    for device in (
        Device("h200", 143_771 * MIB, 989e12, 4.8e12),
        Device("h100", 81_559 * MIB, 989e12, 3.35e12),
        Device("h100-pcie", 81_559 * MIB, 756e12, 2.0e12),
        Device("a100-80", 81_920 * MIB, 312e12, 2.04e12),
        Device("a100-40", 40_960 * MIB, 312e12, 1.56e12),
        Device("l40s", 46_068 * MIB, 362e12, 0.864e12),
        Device("a6000", 49_140 * MIB, 155e12, 0.768e12),
        Device("l4", 23_034 * MIB, 121e12, 0.3e12),
        Device("rtx4090", 24_564 * MIB, 165e12, 1.01e12),
    )
}
PROCESSOR = Device("processor", float("inf"))  # its memory is the host's; how fast it is differs too much


def device_of(text: str) -> Device:
    """A GPU's name of the table, or its memory in GiB. Raises UserError."""
    if text.lower() in DEVICES:
        return DEVICES[text.lower()]
    try:
        memory = float(text) * GIB
    except ValueError:
        memory = 0.0
    if not 0 < memory < float("inf"):  # nan is neither
        raise UserError(f"--gpu {text}: neither GiB of memory nor one of {', '.join(DEVICES)}")
    return Device(f"{text} GiB", memory)


@dataclass(frozen=True)
class Assumptions:
    """What an estimate of time rests on beside the data sheets.

    `efficiency`: share of the peak FLOPs in training and prefill; `decoding`: share of the bandwidth in
    decoding; `launch`: seconds that a decoding step waits for the host, for each layer in eager transformers,
    and `scheduling` in all in vLLM; `queries`: a second, that retriever and encoder answer together.
    """

    efficiency: float = 0.4
    decoding: float = 0.6
    launch: float = 0.001
    scheduling: float = 0.005
    queries: float = 500.0


@dataclass(frozen=True)
class Machine:
    """`gpus` devices; `memory` (bytes) of the host and `disk` (bytes, free), None where not told."""

    gpus: int
    device: Device
    memory: float | None = None
    disk: float | None = None
    price: float | None = None  # a GPU and hour, in any currency
    assumptions: Assumptions = Assumptions()


def computing(machine: Machine, flops: float) -> float | None:
    """Seconds of one device for `flops`, None where its speed is unknown."""
    peak = machine.device.flops
    return None if peak is None else flops / (peak * machine.assumptions.efficiency)
