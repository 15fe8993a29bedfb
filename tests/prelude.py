"""Runs a script after some Python in the same process: `python tests/prelude.py CODE main.py --epochs 2`."""

import runpy
import sys
from pathlib import Path

if __name__ == "__main__":
    code, *sys.argv = sys.argv[1:]
    sys.path[0] = str(Path(__file__).parent.parent)
    exec(code, {})
    runpy.run_path(f"{sys.path[0]}/{sys.argv[0]}", run_name="__main__")
