"""What a file holds, in a few words that a terminal can show, for errors."""

from typing import Any

from bridges.pickles import Bag
from bridges.torchfiles import Stored


def describe(value: Any) -> str:
    """What a file holds, in a few words."""
    if isinstance(value, list | tuple | dict):
        kind = "dict" if isinstance(value, dict) else "list"
        if not value:
            return f"an empty {kind}"
        parts = [describe_part(part) for part in list(value)[:3]]
        return f"a {kind} of {len(value)} ({', '.join(parts)}{', ...' if len(value) > 3 else ''})"
    return describe_part(value)


def describe_part(value: Any) -> str:
    if isinstance(value, Bag):
        return f"a call of {shown(value.of)}, which was not made" if value.called else f"an object {shown(value.of)}"
    if isinstance(value, Stored):
        return f"a tensor {value.shape}"
    return shown(repr(value)) if isinstance(value, str | int | float) else f"a {type(value).__name__}"


def describe_weights(weights: dict[str, Stored]) -> str:
    names = [f"{shown(name)} {weights[name].shape}" for name in list(weights)[:3]]
    return f"{', '.join(names) or 'no weights'}{', ...' if len(weights) > 3 else ''}"


def shown(text: str) -> str:
    """A name of the file without what would move the cursor of a terminal, and not too long."""
    return "".join(c if c.isprintable() else "?" for c in text[:60])
