"""Runs a command that may not outlive its parent: when stdin is closed, ends it and removes a folder.

The compiler holds Python's lock while it works, so it cannot watch for itself; the parent may be killed and cannot
clean up. Lines of stdin are passed on, and so is the exit code (137 for a process that was killed, say for memory).

    watcher.py FOLDER COMMAND …
"""

import os
import shutil
import signal
import subprocess
import sys
import threading


def main():
    folder, command = sys.argv[1], sys.argv[2:]
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, too: it decides
    process, closed = subprocess.Popen(command, stdin=subprocess.PIPE), threading.Event()

    def follow():
        code = process.wait()
        if not closed.is_set():
            os._exit(code if code >= 0 else 128 - code)

    threading.Thread(target=follow, daemon=True).start()
    for line in sys.stdin.buffer:
        process.stdin.write(line)
        process.stdin.flush()
    closed.set()
    process.kill()
    process.wait()
    shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
