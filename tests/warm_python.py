"""Runs a script as `python script.py …` does, in a fork of a process that has imported torch already: 4 s less a run.

Meant for scripts that many tests run; `first` is code that the fork executes before the script, say to set a limit.
"""

import atexit
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

server = None


def start(environment):
    """The server, started once; it ends with this process, because its standard input does."""
    global server
    if server is None:
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        program = Path(__file__).with_name("warm_server.py")
        server = subprocess.Popen([sys.executable, program], env=environment, **pipes)
        atexit.register(server.stdin.close)
    return server


def run(script, arguments, environments, cwd=None, first=""):
    """Run a script at once in as many forks as there are environments; [CompletedProcess with text output, …]."""
    process = start(environments[0])
    with tempfile.TemporaryDirectory() as folder:
        request = dict(
            script=str(script), arguments=list(map(str, arguments)), cwd=str(cwd or os.getcwd()), first=first
        )
        requests = [request | dict(environment=e, output=f"{folder}/{number}") for number, e in enumerate(environments)]
        process.stdin.write(json.dumps(requests) + "\n")
        process.stdin.flush()
        codes = json.loads(process.stdout.readline())
        texts = [[Path(f"{folder}/{n}.{name}").read_text() for n in range(len(codes))] for name in ("stdout", "stderr")]
    return [subprocess.CompletedProcess([str(script), *arguments], *row) for row in zip(codes, *texts)]
