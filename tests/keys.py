"""CURVE keys of hosts that trust one another, and of hosts that should not."""

from __future__ import annotations

from pathlib import Path

from openhelix.runtime.transport.sockets import generate


def key_folders(folder: Path) -> dict[str, Path]:
    """Folders of keys: a server's, a known client's, an unknown one's, another server's client."""
    found = {name: folder / name for name in ("server", "known", "unknown", "misled")}
    server = generate(found["server"], "server")
    other = generate(folder / "other", "server")
    for name in ("known", "unknown", "misled"):
        pair = generate(found[name], name)
        trusted = other if name == "misled" else server
        (found[name] / "server.public").write_bytes(trusted.public)
        if name != "unknown":
            (found["server"] / f"{name}.public").write_bytes(pair.public)
    return found
