"""What a train step takes of its devices: the plan, and the time it takes at least."""

import dataclasses

from peftjax.plan import devices


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a train step takes. Bytes are those of one device, operations those of all devices together.

    Without a compiler, temporaries and moved are estimates, and collectives are not known.
    """

    device: str
    devices: int
    memory: int  # that a program can have
    mesh: dict[str, int]  # the axes that split something
    compiler: str  # empty: it is not installed
    arguments: dict[str, int]  # by what they are
    padding: int  # what the compiler's layouts add to them
    temporaries: int
    others: int  # the program itself, and results that do not take an argument's place
    gradients: int  # a part of temporaries; an estimate, since no compiler tells
    positions: int  # of a batch's sequences, padding included; of images, their patches and class tokens
    base_parameters: int
    trained_parameters: int
    adapter_bytes: int  # of the file; 0 in full fine-tuning
    full_bytes: int  # parameters, gradients and optimizer state of full fine-tuning, without activations
    flops: int  # of the matrix products
    closed_flops: int  # 4 (6 in full fine-tuning) for each parameter of a kernel at each position
    moved: int  # read from and written to the device's memory
    collectives: dict[str, tuple[int, int]]  # by kind, how many and the bytes sent
    refused: str = ""  # what the TPU compiler said, which makes no program that does not fit
    advice: tuple[tuple[str, int], ...] = ()  # what to change, and what it saves

    @property
    def needed(self) -> int:
        """Bytes of a device's memory."""
        return sum(self.arguments.values()) + self.padding + self.temporaries + self.others

    @property
    def fits(self) -> bool:
        return self.needed <= self.memory

    def seconds(self) -> dict[str, float]:
        """The least that a step can take, by what bounds it; empty for a device without a data sheet."""
        chip = devices.find(self.device).chip
        if chip is None:
            return {}
        sent = sum(size for _, size in self.collectives.values())
        found = {
            "products": self.flops / self.devices / chip.flops,
            "memory": self.moved / chip.bandwidth,
            "links": sent / chip.links,
        }
        return {name: value for name, value in found.items() if value}
