"""An AI Hub on this machine: the real qai_hub client talks to it, models run on the CPU with onnxruntime.

    $ python tools/local_hub.py python tools/run_inference.py   # run a command against it, exit with its exit code
    $ python tools/local_hub.py                                 # serve until Ctrl-C; prints what to set

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

from common import refuse


def run_command(command, client_ini):
    """Run a command with QAIHUB_CLIENT_INI set and this Python first on the PATH; returns its exit code."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    environment = os.environ | {"QAIHUB_CLIENT_INI": str(client_ini), "PATH": path}
    try:
        process = subprocess.Popen(command, env=environment)
    except OSError as e:
        refuse(f"cannot run {command[0]}: {e.strerror}")
    signal.signal(signal.SIGTERM, lambda *_: process.terminate())
    while True:
        with contextlib.suppress(KeyboardInterrupt):  # Ctrl-C reaches the command, too: it decides
            code = process.wait()
            return code if code >= 0 else 128 - code


def main():
    command = sys.argv[1:]
    if command[:1] in (["-h"], ["--help"]):
        print(__doc__)
        return
    from hub_server import LocalHub
    from hub_server.records import EMULATED

    logging.disable(logging.WARNING)  # onnxruntime's quantizer warns on the root logger
    with LocalHub() as hub:
        client_ini = hub.write_client_ini(hub.folder / "client.ini")
        print(f"local hub at {hub.url}: jobs are {EMULATED}; figures are not a device's", file=sys.stderr)
        if command:
            sys.exit(run_command(command, client_ini))
        print(f"in another terminal: export QAIHUB_CLIENT_INI={client_ini}\nCtrl-C stops the hub", flush=True)
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        with contextlib.suppress(KeyboardInterrupt):
            threading.Event().wait()


if __name__ == "__main__":
    main()
