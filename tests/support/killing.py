"""Kill a child process just before its n-th operation on files."""

from __future__ import annotations

import os
import signal
import sys

_OPERATIONS = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.chmod", "shutil.rmtree")


def killed(work, place, before):
    """Run `work` in a child that is killed just before its n-th operation on files below `place`; whether it was."""
    child = os.fork()
    if child == 0:
        seen = 0

        def watch(event, arguments):
            nonlocal seen
            if event in _OPERATIONS and any(str(place) in str(a) for a in arguments):
                seen += 1
                if seen == before:
                    os.kill(os.getpid(), signal.SIGKILL)

        try:
            sys.addaudithook(watch)
            work()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
