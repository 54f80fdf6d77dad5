"""`python -m openhelix`: the command line."""

from __future__ import annotations

from openhelix.runtime.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main())
