"""How many random examples a property is tried on, where they are many."""

from typing import Any

from hypothesis import settings


def random_examples(by_hand: int, **options: Any) -> settings:
    """So many, new ones on each run, by hand; in CI, where they are the same every time, two fifths of them."""
    return settings(max_examples=by_hand * 2 // 5 if settings.default.derandomize else by_hand, **options)
