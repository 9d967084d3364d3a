"""One check of a number's range, with one error sentence for all arguments."""

from typing import Any


def check_range(name: str, value: Any, least: float, most: float | None = None, whole: bool = False) -> None:
    """Raises ValueError, naming the argument, unless value is a number from least to most, both allowed.

    whole: it must be an int. Booleans, text and NaN are never in a range.
    """
    number = type(value) is int or type(value) is float and not whole
    if number and least <= value and (most is None or value <= most):
        return
    if most is None:
        limits = f"be {'a whole number of ' * whole}at least {least}"
    else:
        limits = f"be a whole number from {least} to {most}" if whole else f"lie between {least} and {most}"
    raise ValueError(f"{name}={value!r} does not fit: it must {limits}.")


def check_at_least(**limits: tuple[float | None, float]) -> None:
    """name=(value, least): raises ValueError, naming the argument, for a value below the least. None was not given."""
    for name, (value, least) in limits.items():
        if value is not None:
            check_range(name, value, least)
