"""How child processes begin, where they listen, and how they end."""

import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress

from core.errors import DeploymentError

LOOPBACK = "127.0.0.1"
"""Where the servers that we start listen, out of reach of other machines."""

PORTS = range(20_000, 30_000)
"""What `free_port` chooses from."""

# Asks the kernel to end this process with its parent, then becomes the program under the same pid. A program of its
# own and not a preexec_fn, which may deadlock in a process that has threads.
_DIE_WITH_PARENT = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGTERM)
if os.getppid() == int(sys.argv[1]):
    os.execv(sys.argv[2], sys.argv[2:])
"""


def die_with_parent(command: Sequence[str]) -> list[str]:
    """Wrap a command, whose first word is a path, so that it gets SIGTERM should this thread's process be killed.

    Only Linux can do that; elsewhere the command stays as it is.
    """
    if sys.platform != "linux":
        return list(command)
    return [sys.executable, "-I", "-S", "-c", _DIE_WITH_PARENT, str(os.getpid()), *command]


def free_port() -> int:
    """Find a port of loopback that nobody listens on now, below the range from which outgoing connections get theirs.

    In that range a connection of any program could take the port of a server that is about to be started again.

    Raises:
        DeploymentError: this machine lets us listen nowhere.
    """
    for port in random.SystemRandom().sample(PORTS, 20):
        with socket.socket() as probe, suppress(OSError):
            probe.bind((LOOPBACK, port))
            return port
    raise DeploymentError(f"No free port was found on {LOOPBACK}")


def stop(processes: Sequence[subprocess.Popen[bytes]], patience_seconds: float) -> None:
    """End processes together: SIGTERM, and SIGKILL for those that have not ended when patience is over."""
    for process in processes:
        process.terminate()
    give_up_at = time.monotonic() + patience_seconds
    for process in processes:
        try:
            process.wait(max(0.1, give_up_at - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def exit_on_signals() -> None:
    """Let SIGTERM end this process like Ctrl-C: through every `with`, so that what was started is stopped.

    SIGINT too, even if it is ignored, as shells leave it for what a script starts in the background.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, lambda number, _frame: sys.exit(128 + number))
