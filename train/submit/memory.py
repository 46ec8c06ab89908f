"""The peak memory of a process. The function is also sent, as source, to processes without this project."""


def peak_memory() -> int:
    """Return the most bytes of memory that this process has held at a time.

    VmHWM is the process's own; Linux keeps `ru_maxrss` across exec, where a child would report its parent's.
    """
    import resource
    import sys

    try:
        with open("/proc/self/status") as stream:
            lines = [line for line in stream if line.startswith("VmHWM:")]
        return int(lines[0].split()[1]) * 1024
    except (OSError, IndexError):  # no Linux
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
