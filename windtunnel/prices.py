"""Prices of GPUs: dollars per GPU-hour by device, as `--gpu-price` gives them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from engine.errors import InputError
from engine.specs import catalog
from studies.capacity.sweep import price_of

EXAMPLE = "give dollars per GPU-hour such as 2.5, or a100=2,h100=4"


def prices(given: str | float | Mapping[str, float], devices: Sequence[str] = ()) -> dict[str, float]:
    """Return dollars per GPU-hour by device, of "2.5" (any device: ""), of "a100=2,h100=4", or of a mapping.

    `devices` are the caller's own, names or paths: a price may name one by the name that its file gives it.

    Raises InputError for what is no price above 0, an unknown device, and a device that is named twice.
    """
    if isinstance(given, Mapping):
        parts = [(str(name), str(price)) for name, price in given.items()]
    else:
        parts = [(name.strip(), price) for name, _, price in (part.rpartition("=") for part in str(given).split(","))]
    found: dict[str, float] = {}
    own = {catalog.device(each).name for each in devices if not catalog.is_name("device", each)}
    for name, price in parts:
        number = re.fullmatch(r"[0-9]{0,9}\.?[0-9]{1,9}", price.strip())
        if number is None or float(number[0]) == 0 or (not name and price != str(given)):
            raise InputError(f"--gpu-price {_shown(given)}: {f'{name}={price}' if name else price!r}: {EXAMPLE}")
        device = name if name in own or not name else catalog.device(name).name
        if device in found:
            raise InputError(f"--gpu-price {_shown(given)}: {device or 'any device'} has two prices: remove one")
        found[device] = float(number[0])
    if not found:
        raise InputError(f"--gpu-price {_shown(given)}: {EXAMPLE}")
    return found


def prices_of(devices: Sequence[str], known: Mapping[str, float]) -> list[float]:
    """Return each device's price. Raises InputError for one without."""
    found = []
    for device in devices:
        price = price_of(device, known)
        if price is None:
            raise InputError(f"--gpu-price has no price of {device}: add {device}=DOLLARS per GPU-hour")
        found.append(price)
    return found


def _shown(given: object) -> str:
    return repr(given)
