"""Closes a Python process in before its program starts: no network, no other program, no writing but where it
may.

Python imports a module of this name by itself when its folder is on PYTHONPATH, so the caller's command line
stays exactly as the grader types it. Modes of files do not stop root, hence these layers:

- an audit hook, everywhere: what Python code itself opens, makes, removes, renames or connects;
- on Linux, the process gives up its capabilities: from then on the modes of read-only files bind root too,
  in compiled code as well (OpenCV and PyTorch write files without telling Python);
- on Linux, where the kernel allows it, a network of its own in which nothing can be reached.

It is for honest programs that write or download where the grader would not let them, not for hostile ones.
Runs under Python 3.8 and newer; the standard library only.
"""

import ctypes
import json
import os
import sys

SETTINGS_VARIABLE = "GRADER_SANDBOX"  # JSON: {"writable": [folders]}
BROKEN_STATUS = 97  # of a process that could not be closed in

WRITING = os.O_WRONLY | os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_TRUNC
# Events of the interpreter, and which of their arguments name what is about to be changed.
FIRST = "chflags chmod chown mkdir remove removexattr rmdir setxattr truncate utime"
CHANGES: dict = dict.fromkeys(["os." + name for name in FIRST.split()], (0,))
CHANGES.update({"os.link": (0, 1), "os.rename": (0, 1), "os.symlink": (1,)})
NETWORK = "bind connect getaddrinfo gethostbyaddr gethostbyname getnameinfo sendmsg sendto"
PROGRAMS = "os.exec os.posix_spawn os.spawn os.system pty.spawn subprocess.Popen"
REFUSED = {"socket." + name for name in NETWORK.split()} | set(PROGRAMS.split())

CAPABILITY_VERSION = 0x20080522
MAY_READ_ALL = 1 << 2  # CAP_DAC_READ_SEARCH, kept: root goes on reading what belongs to others
NEW_NETWORK = 0x40000000  # CLONE_NEWNET

LAYERS: list = []  # what holds in this process, in words


def is_writable(path, writable):
    """Return whether `path` is one of the folders `writable`, below one, or the null device.

    A relative path counts from the working folder, even where a call counts it from an open folder.
    """
    real = os.path.realpath(os.fsdecode(path))
    return real == os.devnull or any((real + os.sep).startswith(folder + os.sep) for folder in writable)


def refuse(what):
    """Raise the error that a read-only disk or a missing network gives."""
    raise PermissionError(13, "refused by the grader's sandbox", what)


def make_hook(writable):
    """Return the audit hook that lets only what lies below `writable` be changed."""

    def hook(event, arguments):
        if event == "open":
            path, _, flags = arguments
            # A number is a file that is open already.
            if not isinstance(path, int) and flags & WRITING and not is_writable(path, writable):
                refuse(os.fsdecode(path))
        elif event in CHANGES:
            for index in CHANGES[event]:
                if isinstance(arguments[index], int) or not is_writable(arguments[index], writable):
                    refuse("%s %s" % (event, arguments[index]))
        elif event in REFUSED:
            refuse("%s %r" % (event, arguments[-1:]))

    return hook


def leave_network(libc):
    """Move the process into an empty network; return whether the kernel let it."""
    return libc.unshare(NEW_NETWORK) == 0


def drop_capabilities(libc):
    """Give up all capabilities but reading; return whether that worked."""
    words = ctypes.c_uint32 * 6  # effective, permitted, inheritable; twice, since a set has 64 bits
    header, sets = (ctypes.c_uint32 * 2)(CAPABILITY_VERSION, 0), words()
    if libc.capget(header, sets) != 0:
        return False
    kept = sets[1] & MAY_READ_ALL
    return libc.capset(header, words(kept, kept, 0, 0, 0, 0)) == 0


def close_in(writable):
    """Put all layers in force and note them in LAYERS."""
    libc = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None
    if libc and leave_network(libc):
        LAYERS.append("empty network")
    if drop_capabilities(libc) if libc else os.geteuid() != 0:
        LAYERS.append("modes of files")
    sys.addaudithook(make_hook([os.path.realpath(folder) for folder in writable]))
    LAYERS.append("audit hook")


try:
    close_in(json.loads(os.environ[SETTINGS_VARIABLE])["writable"])
except BaseException as error:  # Python goes on after a sitecustomize that failed: unprotected
    print("error: the sandbox failed, %s: %s" % (type(error).__name__, error), file=sys.stderr, flush=True)
    os._exit(BROKEN_STATUS)
