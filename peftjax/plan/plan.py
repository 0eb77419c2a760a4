"""The plan of a train step: the memory it needs, the work it does, and the least time it takes."""

import dataclasses

from peftjax.plan import devices


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What a train step needs. Bytes are per device; FLOP are the total of all devices.

    `--json` writes these fields. Without a compiler, `temporaries` and `moved` are estimates and `collectives` is empty.

    Attributes:
        device: Full name of the devices.
        devices: Number of devices.
        memory: Bytes that a program can allocate.
        mesh: Sizes of the mesh axes that split something.
        compiler: Name of the compiler; empty if it is not installed.
        arguments: Bytes of the step's arguments by group.
        padding: Bytes that the compiler's layouts add to the arguments.
        temporaries: Bytes of activations and other intermediate values.
        others: Bytes of the program itself and of outputs that do not reuse an argument's memory.
        gradients: Bytes of the gradients, which are part of `temporaries`. An estimate, since no compiler reports them.
        members: Number of runs that the step trains together.
        positions: Number of positions in the batches of all members, padding included; for images, patches and class tokens.
        base_parameters: Number of parameters in the base.
        active_parameters: Number of these that one position uses: fewer in a mixture of experts.
        trained_parameters: Number of trainable parameters of each member.
        adapter_bytes: Size of the adapter file of each member; 0 for full fine-tuning.
        full_bytes: Bytes of parameters, gradients and optimizer state of full fine-tuning of one member, without activations.
        flops: FLOP of the matrix products. For a mixture of experts, see `experts.ExpertUse`.
        closed_flops: 4 FLOP (6 for full fine-tuning) for each active kernel parameter at each position.
        moved: Bytes read from and written to the device's memory.
        collectives: For each kind, how many run and the bytes sent.
        attention: The implementation of attention.
        refused: The message of the TPU compiler if it rejects the program because it does not fit.
        advice: Changes to the config and the bytes that each of them saves, the largest first.
    """

    device: str
    devices: int
    memory: int
    mesh: dict[str, int]
    compiler: str = ""
    arguments: dict[str, int]
    padding: int = 0
    temporaries: int
    others: int = 0
    gradients: int
    members: int
    positions: int
    base_parameters: int
    active_parameters: int
    trained_parameters: int
    adapter_bytes: int
    full_bytes: int
    flops: int
    closed_flops: int
    moved: int
    collectives: dict[str, tuple[int, int]] = dataclasses.field(default_factory=dict)
    attention: str = ""
    refused: str = ""
    advice: tuple[tuple[str, int], ...] = ()

    @property
    def needed(self) -> int:
        """Bytes of memory that the step needs on each device."""
        return sum(self.arguments.values()) + self.padding + self.temporaries + self.others

    @property
    def fits(self) -> bool:
        """Whether the step fits into the memory of each device."""
        return self.needed <= self.memory

    def seconds(self) -> dict[str, float]:
        """Return the least time of a step for each resource ("products", "memory", "links"), in seconds: the work divided
        by the data sheet's peak. The largest of them is the roofline bound. Empty for a device without a data sheet."""
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
