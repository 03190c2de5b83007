"""What there is of Qualcomm on this machine without an account: its compiler, its HTP emulator, its published figures.

For tools/compile_offline.py and whatever runs its binaries here. Nothing of Qualcomm's lies here: the wheels are
installed into a folder that git ignores.
"""
