"""What the host's memory can give."""

from __future__ import annotations


def free_host_memory() -> float:
    """Bytes that the host can give; infinite where the system does not tell."""
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            kilobytes = {name: int(rest.split()[0]) for name, rest in (x.split(":") for x in lines)}
        return 1024.0 * kilobytes["MemAvailable"]
    except (OSError, KeyError, ValueError):
        return float("inf")
