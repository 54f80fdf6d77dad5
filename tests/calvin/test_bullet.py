"""Importing the simulator prints nothing, and swallows nobody else's output."""

from __future__ import annotations

import subprocess
import sys

OTHERS = """
import os, sys, threading
import openhelix.benchmarks.calvin.urdf
class Meanwhile:  # what another thread prints in that moment
    def find_spec(self, name, path=None, target=None):
        if name == "pybullet":
            os.write(2, b"said meanwhile\\n")
sys.meta_path.insert(0, Meanwhile())
print("before", file=sys.stderr)
import openhelix.benchmarks.calvin.physics as physics
print("after", physics.p.DIRECT >= 0, file=sys.stderr)
"""
CLOSED = """
import os
os.close(2)
import openhelix.benchmarks.calvin.physics as physics
assert physics.p.connect(physics.p.DIRECT) >= 0
"""


def printed(program: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert not done.stdout
    return done.stderr


def test_only_what_others_print_is_seen() -> None:
    assert printed(OTHERS) == "before\nsaid meanwhile\nafter True\n"


def test_it_is_imported_where_standard_error_is_closed() -> None:
    assert printed(CLOSED) == ""
