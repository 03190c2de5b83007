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

SERVER = """
import atexit, gc, json, os, runpy, signal, sys, threading
import av, h5py, matplotlib.pyplot, numpy, onnx, qai_hub, scipy.signal, torch, torchvision, tqdm
import torch.distributed, torch.utils.flop_counter

def run(script, arguments, environment, cwd, output, first):
    for number, name in (1, "stdout"), (2, "stderr"):
        os.dup2(os.open(f"{output}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv, sys.path[0] = [script, *arguments], os.path.dirname(script)
    exec(first, {})
    runpy.run_path(script, run_name="__main__")

def exit_code_of(request):
    try:
        run(**request)
    except SystemExit as e:
        if isinstance(e.code, (int, type(None))):
            return e.code or 0
        print(e.code, file=sys.stderr)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    else:
        return 0
    return 1

gc.freeze()
for line in sys.stdin:
    children = []
    for request in json.loads(line):
        children.append(os.fork())
        if not children[-1]:
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            signal.alarm(600)
            code = exit_code_of(request)
            # what Python does at its end, but for taking apart all modules, which takes a second
            threading._shutdown()
            atexit._run_exitfuncs()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    print(json.dumps(codes), flush=True)
"""
server = None


def start(environment):
    """The server, started once; it ends with this process, because its standard input does."""
    global server
    if server is None:
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        server = subprocess.Popen([sys.executable, "-c", SERVER], env=environment, **pipes)
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
