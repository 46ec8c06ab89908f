"""Run under the sandbox: tries what it has to refuse, and prints as JSON what got through.

It is read as text and run with `-c` by the interpreter under test, Python 3.9 too.
"""

import ctypes
import errno
import importlib.metadata
import importlib.util
import json
import os
import platform
import socket
import struct
import subprocess
import sys

import sitecustomize  # the sandbox: train/submit/grader/hook

CLOSED_PORT = 9  # nothing listens there: a connection that gets out is refused by the other side
TCP = (2, 1, 0)  # AF_INET, SOCK_STREAM, any protocol

request = json.loads(sys.argv[1])
inside, strange = request["input"], os.path.join(os.path.dirname(request["input"]), "stray")


def touch(path, mode):
    """Open a file, and close it."""
    with open(path, mode):
        pass


def gets_through(attempt):
    """Return whether an attempt had another end than the sandbox's refusal."""
    try:
        attempt()
    except PermissionError:
        return False
    except OSError:
        return True
    return True


def compiled_write(path, mode):
    """Open a file from compiled code, of which the audit hook hears nothing."""
    libc = ctypes.CDLL(None)
    libc.fopen.restype = ctypes.c_void_p
    if libc.fopen(path.encode(), mode) is None:
        raise PermissionError(path)


def compiled_connect():
    """Connect from compiled code; only a network in which nothing can be reached refuses that."""
    libc = ctypes.CDLL(None, use_errno=True)
    address = struct.pack("=H", 2) + struct.pack("!H4B8x", CLOSED_PORT, 127, 0, 0, 1)
    if libc.connect(libc.socket(*TCP), address, len(address)) != 0:
        if ctypes.get_errno() == errno.ENETUNREACH:
            raise PermissionError("no network")
        raise OSError("the other side answered")


ATTEMPTS = {
    "audit hook": {
        "write beside solution.py": lambda: touch("stray", "w"),
        "change solution.py": lambda: touch("solution.py", "a"),
        "change an input": lambda: touch(inside, "r+b"),
        "make an input writable": lambda: os.chmod(inside, 0o644),
        "move an input": lambda: os.rename(inside, strange),
        "make a folder among the inputs": lambda: os.mkdir(strange),
        "write into the home folder": lambda: touch(os.path.expanduser("~/stray"), "w"),
        "write a temporary file": lambda: touch(os.path.join(request["temporary"], "stray"), "w"),
        "connect": lambda: socket.create_connection(("127.0.0.1", CLOSED_PORT), 5),
        "look up a name": lambda: socket.getaddrinfo("localhost", CLOSED_PORT),
        "start a program": lambda: subprocess.run([sys.executable, "-V"]),
    },
    "modes of files": {
        "change an input from compiled code": lambda: compiled_write(inside, b"r+b"),
        "write among the inputs from compiled code": lambda: compiled_write(strange, b"wb"),
        "write beside solution.py from compiled code": lambda: compiled_write("stray", b"wb"),
    },
    "empty network": {"connect from compiled code": compiled_connect},
}


def version_of(package):
    """Return the version of an installed package, None where it is absent."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


print(
    json.dumps(
        {
            "layers": sitecustomize.LAYERS,
            "through": [
                what
                for layer in sitecustomize.LAYERS
                for what, attempt in ATTEMPTS[layer].items()
                if gets_through(attempt)
            ],
            "python": platform.python_version(),
            "versions": {package: version_of(package) for package in request["packages"]},
            "present": [name for name in request["absent"] if importlib.util.find_spec(name)],
        }
    )
)
