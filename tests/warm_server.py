"""The process that warm_python.py forks: it has imported what scripts import, and runs a script in each fork.

A request is one line of JSON on stdin, a list of {script, arguments, environment, cwd, output, first}; the answer one
line on stdout, the list of their exit codes. It ends when stdin does.
"""

import atexit
import gc
import importlib
import json
import os
import runpy
import signal
import sys
import threading

IMPORTED = [
    "av", "h5py", "matplotlib.pyplot", "numpy", "onnx", "qai_hub", "scipy.signal", "torch", "torch.distributed",
    "torch.utils.flop_counter", "torchvision", "tqdm",
]  # fmt: skip


def run(script, arguments, environment, cwd, output, first):
    """What `python script.py …` does, in this process; its output goes to the files OUTPUT.stdout and .stderr."""
    for number, name in (1, "stdout"), (2, "stderr"):
        os.dup2(os.open(f"{output}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv, sys.path[0] = [script, *arguments], os.path.dirname(script)
    exec(first, {})
    runpy.run_path(script, run_name="__main__")


def exit_code_of(request):
    """Run a request; returns the exit code that Python would end with."""
    try:
        try:
            run(**request)
        except SystemExit:
            raise
        except BaseException:
            sys.excepthook(*sys.exc_info())  # a script's own may end in a SystemExit
            return 1
    except SystemExit as e:
        if isinstance(e.code, (int, type(None))):
            return e.code or 0
        print(e.code, file=sys.stderr)
        return 1
    return 0


def end(code):
    """What Python does at its end, but for taking apart all modules, which takes a second."""
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def main():
    for name in IMPORTED:
        importlib.import_module(name)
    gc.freeze()
    for line in sys.stdin:
        children = []
        for request in json.loads(line):
            children.append(os.fork())
            if not children[-1]:
                os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
                signal.alarm(600)
                end(exit_code_of(request))
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        print(json.dumps(codes), flush=True)


if __name__ == "__main__":
    main()
