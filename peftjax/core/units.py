"""Human-readable byte counts and durations."""


def format_bytes(count: float) -> str:
    """Format a number of bytes with a binary unit: 999 B, 1.5 KiB, 20.3 MiB."""
    unit, units = "B", iter(("KiB", "MiB", "GiB", "TiB"))
    while count >= 1024 and unit != "TiB":
        count, unit = count / 1024, next(units)
    return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.1f} {unit}"


def format_clock(seconds: float) -> str:
    """Format a duration in seconds as m:ss or h:mm:ss."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def format_clocks(passed: float, left: float | None) -> str:
    """Format the seconds that have passed, and those left if they are known: "0:42, 1:10 left"."""
    return format_clock(passed) + ("" if left is None else f", {format_clock(left)} left")
