"""The environment of quickstart.py and tests/run.py: `.venv` beside the README."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

from common import REPO, names, refuse


def make_environment(*requirement_files):
    """Create `.venv` beside the README with what the requirement files name; returns the path of its Python.

    Runs on any Python 3.10 to 3.13 with nothing installed. Done once: a stamp remembers the files' content. Exits
    with code 2 and one sentence if this Python is too old or new, cannot create it, or pip cannot install.
    """
    if not (3, 10) <= sys.version_info[:2] <= (3, 13):
        refuse(f"Python 3.10 to 3.13 is needed (qai_hub_models 0.65), this is {sys.version.split()[0]}")
    home = REPO / ".venv"
    python = home / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    wanted = hashlib.sha256(b"".join(Path(f).read_bytes() for f in requirement_files)).hexdigest()
    stamp = home / f"installed-{wanted[:16]}"
    if stamp.exists():
        return python
    # pip comes last: without it, making the environment was interrupted
    if not python.exists() or subprocess.run([str(python), "-m", "pip", "--version"], capture_output=True).returncode:
        print(f"creating {home.relative_to(REPO)} …", flush=True)
        if subprocess.run([sys.executable, "-m", "venv", "--clear", str(home)]).returncode:
            if os.pathsep in str(home):  # what venv itself refuses, from 3.11 on
                refuse(
                    f"Python makes no environment below a folder with {os.pathsep!r} in its name: "
                    f"{names.printable(REPO)}. Rename it, or make one elsewhere and link it: "
                    "python3 -m venv ~/lpcvc && ln -s ~/lpcvc .venv"
                )
            refuse("this Python cannot create environments; on Debian or Ubuntu: apt install python3-venv")
    print("installing packages (some 6 GB with the CUDA build of torch; 2 to 10 minutes) …", flush=True)
    requirements = [part for file in requirement_files for part in ("-r", str(file))]
    if subprocess.run([str(python), "-m", "pip", "install", "--quiet", *requirements]).returncode:
        refuse("pip could not install requirements.txt; its message stands above")
    stamp.touch()
    return python
