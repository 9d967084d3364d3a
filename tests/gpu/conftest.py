"""The fixtures of tests/conftest.py, also where only this folder is run."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
