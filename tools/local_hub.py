"""An AI Hub on this machine: the real qai_hub client talks to it, models run on the CPU with onnxruntime.

    $ python tools/local_hub.py python tools/run_inference.py   # run a command against it, exit with its exit code
    $ python tools/local_hub.py                                 # serve until Ctrl-C; prints what to set
    $ python tools/local_hub.py --qairt-versions "2.54 2.52" python tools/example_export.py   # flags come first

No account, no network: it listens on 127.0.0.1 and answers the REST calls of qai_hub 0.56 with the messages of
`qai_hub.public_api_pb2`. A command finds it through QAIHUB_CLIENT_INI, which names a temporary client.ini. Compile,
quantize, link, inference and profile jobs are emulated: numbers are those of this CPU, not of a Qualcomm device, and
the binaries it makes start with a line that says so. It reads what clients upload and writes into a temporary folder
that goes when it stops. The server itself is tools/hub_server/.
"""

import contextlib
import logging
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import common
from common import flags

# ----------------------------------------------------------------------------------------------------------------------
QAIRT_VERSIONS = "2.50 2.48"  # versions of QAIRT on offer; the first is the default and the latest
# ----------------------------------------------------------------------------------------------------------------------


def split_command(words):
    """(flags of this script, the command to run): the command begins with the first word that belongs to no flag."""
    i = 0
    while i < len(words) and words[i].startswith("-"):
        i += 1 if "=" in words[i] or words[i] in ("-h", "--help") else 2
    return words[:i], words[i:]


def without_proxy(environ):
    """Variables that keep clients from asking a proxy for this machine's own addresses."""
    hosts = ",".join(filter(None, ["127.0.0.1,localhost", environ.get("NO_PROXY") or environ.get("no_proxy")]))
    return {"NO_PROXY": hosts, "no_proxy": hosts}


def run_command(command, client_ini):
    """Run a command with QAIHUB_CLIENT_INI set and this Python first on the PATH; returns its exit code."""
    # resolved: a `.venv` below a folder with a ":" is a link, and PATH cannot name the folder
    path = os.pathsep.join([str(Path(sys.executable).parent.resolve()), os.environ.get("PATH", "")])
    environment = os.environ | without_proxy(os.environ) | {"QAIHUB_CLIENT_INI": str(client_ini), "PATH": path}
    try:
        process = subprocess.Popen(command, env=environment)
    except OSError as e:
        common.refuse(f"cannot run {command[0]}: {e.strerror}")
    signal.signal(signal.SIGTERM, lambda *_: process.terminate())
    while True:
        with contextlib.suppress(KeyboardInterrupt):  # Ctrl-C reaches the command, too: it decides
            code = process.wait()
            return code if code >= 0 else 128 - code


def main():
    own, command = split_command(sys.argv[1:])
    if own in (["-h"], ["--help"]):
        print(__doc__)
    flags.set_constants_from_flags(globals(), own)
    from hub_server import LocalHub
    from hub_server.records import EMULATED

    logging.disable(logging.WARNING)  # onnxruntime's quantizer warns on the root logger
    with LocalHub(QAIRT_VERSIONS.split()) as hub:
        client_ini = hub.write_client_ini(hub.folder / "client.ini")
        where = "" if command else f" at {hub.url}"
        print(f"local hub{where}: jobs are {EMULATED}; figures are not a device's", file=sys.stderr)
        if command:
            sys.exit(run_command(command, client_ini))
        proxy = without_proxy(os.environ)["NO_PROXY"]
        print(f"in another terminal: export NO_PROXY={proxy} QAIHUB_CLIENT_INI={client_ini}")
        print("Ctrl-C stops the hub", flush=True)
        for number in (signal.SIGINT, signal.SIGTERM):  # SIGINT, too: a shell's background job ignores it
            signal.signal(number, signal.default_int_handler)
        with contextlib.suppress(KeyboardInterrupt):
            threading.Event().wait()


if __name__ == "__main__":
    main()
