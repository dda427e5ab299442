"""Which layer runs at which depth: one value, made from how a model shares its layers."""

from collections.abc import Sequence
from dataclasses import dataclass, field

__all__ = ["SHARINGS", "Schedule"]

#: Paper, table 1: own first and last layer; layers in cycles rather than each R times in sequence.
_SHARINGS = {
    "middle_cycle": (True, True),
    "cycle": (False, True),
    "middle_sequence": (True, False),
    "sequence": (False, False),
}
SHARINGS = tuple(_SHARINGS)


@dataclass(frozen=True)
class Schedule:
    """The unrolled layers of a model, first to last.

    A depth is a place among the unrolled layers; a use of a layer is one of the depths it runs at.

    Attributes:
        layers: the unique layer at each depth.
        num_recursions: the number R.
        num_ends: 1 if the first and the last depth have layers of their own, which no recursion
            repeats; else 0.
        in_cycles: a recursion runs the whole block once. Otherwise every layer runs R times in
            sequence, and there is no recursion step after which a token could exit.
        caches: index in a cache of the keys and values of each depth.
        kv_strategy: "recursion", "shared" or "hybrid"; see `MoRConfig`.
        uses: how many earlier depths used the layer of each depth.
    """

    layers: tuple[int, ...]
    num_recursions: int
    num_ends: int = 0
    in_cycles: bool = True
    caches: tuple[int, ...] = ()
    kv_strategy: str = "recursion"
    uses: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        # Made here, not on first use: Dynamo cannot trace the lock of `cached_property`.
        uses = (self.layers[:depth].count(layer) for depth, layer in enumerate(self.layers))
        object.__setattr__(self, "uses", tuple(uses))

    @classmethod
    def of_model(
        cls, num_layers: int, num_recursions: int, sharing: str, kv_strategy: str
    ) -> "Schedule":
        """The schedule of a model of `num_layers` unrolled layers.

        Args:
            num_layers: the number L.
            num_recursions: the number R.
            sharing: one of `SHARINGS`.
            kv_strategy: see the attributes.
        """
        has_ends, in_cycles = _SHARINGS[sharing]
        ends = int(has_ends)
        shared = range(ends, ends + (num_layers - 2 * ends) // num_recursions)
        if in_cycles:
            middle = [*shared] * num_recursions
        else:
            middle = [layer for layer in shared for _ in range(num_recursions)]
        own = ([0], [shared.stop]) if has_ends else ([], [])
        layers = (*own[0], *middle, *own[1])
        caches = tuple(range(len(layers)))
        return cls(layers, num_recursions, ends, in_cycles, caches, kv_strategy)

    @classmethod
    def of_block(cls, num_layers: int, num_recursions: int, caches: Sequence[int]) -> "Schedule":
        """The schedule of a block of layers alone, as it stands in a swapped model."""
        layers = (*range(num_layers),) * num_recursions
        return cls(layers, num_recursions, caches=tuple(caches))

    @property
    def shared_depths(self) -> range:
        """The depths between the own first and last layers."""
        return range(self.num_ends, len(self.layers) - self.num_ends)

    @property
    def block_depth(self) -> int:
        """b, layers of the shared block (or, for the sequence strategies, of the repeated part)."""
        return len(self.shared_depths) // self.num_recursions

    @property
    def num_unique_layers(self) -> int:
        """Layers that have their own weights."""
        return max(self.layers) + 1

    @property
    def encoded_depths(self) -> range:
        """Depths whose output a recursion encoding multiplies: where a block ends.

        For the sequence strategies a block is one layer.
        """
        each = self.block_depth if self.in_cycles else 1
        return self.shared_depths[each - 1 :: each]

    def step(self, recursion: int) -> range:
        """The depths of one recursion step."""
        return self.shared_depths[recursion * self.block_depth :][: self.block_depth]

    def depths_of(self, layer: int) -> list[int]:
        """Every depth that uses a unique layer."""
        return [depth for depth, used in enumerate(self.layers) if used == layer]

    def reuses_kv(self, depth: int) -> bool:
        """Whether a depth attends over the keys and values of its layer's first use."""
        return self.kv_strategy != "recursion" and self.uses[depth] > 0

    def computes_kv(self, depth: int) -> bool:
        """Whether a depth computes keys and values of its own tokens."""
        return self.kv_strategy != "shared" or self.uses[depth] == 0
