"""Options of heads that several mixers share, and what is refused of them."""

from dataclasses import dataclass

from longtrain.layers.mixers.base import LayerPlace, check_divides, check_heads


@dataclass(frozen=True)
class GroupedHeads:
    """Query heads, some of which share a key/value head."""

    heads: int = 8  # H, query heads
    kv_heads: int | None = None  # G, key/value heads that the query heads share; None: as many as heads
    head_width: int | None = None  # K and V; None: width / heads

    @property
    def groups(self) -> int:
        return self.heads if self.kv_heads is None else self.kv_heads

    def key_width(self, width: int) -> int:
        return width // self.heads if self.head_width is None else self.head_width


@dataclass(frozen=True)
class RotaryHeads(GroupedHeads):
    """The same, queries and keys rotated by their positions."""

    rope_base: float = 10_000.0  # rotary wavelengths reach 2 pi times this many tokens


@dataclass(frozen=True)
class DeltaHeads:
    """Heads of a gated delta rule, whose keys and values have widths of their own."""

    heads: int = 8  # H, heads of values
    key_width: int | None = None  # K of a head; None: width / heads
    value_width: int | None = None  # V of a head; None: as key_width (the papers take twice that)

    def widths(self, width: int) -> tuple[int, int]:
        """K and V."""
        key = width // self.heads if self.key_width is None else self.key_width
        return key, key if self.value_width is None else self.value_width


def check_delta_heads(config: DeltaHeads, place: LayerPlace) -> None:
    """Refuse, with a ValueError, numbers and widths of heads that cannot work."""
    for option in ("key_width", "value_width"):
        given = getattr(config, option)
        if given is not None and given < 1:
            raise ValueError(f"{option}: got {given}, it must be at least 1")
    check_heads(config.heads, config.key_width, place)


def check_grouped_heads(config: GroupedHeads, place: LayerPlace) -> None:
    """Refuse, with a ValueError, numbers and widths of heads that cannot work."""
    check_heads(config.heads, config.head_width, place)
    check_divides("kv_heads", config.groups, "heads", config.heads)


def check_rotary_heads(config: RotaryHeads, place: LayerPlace) -> None:
    """Refuse, with a ValueError, heads that cannot work or be rotated."""
    check_grouped_heads(config, place)
    check_rotation(config.key_width(place.width), config.rope_base)


def check_rotation(width: int, base: float) -> None:
    """Refuse, with a ValueError, a width of heads that cannot be rotated, or a base that turns nothing."""
    if width % 2:
        raise ValueError(f"head_width: got {width}, rotary positions need an even number from 2 on")
    if not base > 1:
        raise ValueError(f"rope_base: got {base}, it must be above 1")
