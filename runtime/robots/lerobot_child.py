"""The process in which a LeRobot arm lives; run by path under the interpreter that has LeRobot.

LeRobot needs Python 3.12 and pins its own torch, so the arm's driver runs beside the runtime and
answers over a socket (`pipe.py`). It uses the standard library, NumPy and LeRobot only; what the
numbers mean is known to the adapter on the other side.

Arguments: descriptor of the socket, and the arm as JSON: `target`, `config_target`, `config`.
"""

from __future__ import annotations

import importlib
import json
import os
import pkgutil
import socket
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    HERE = str(Path(__file__).resolve().parent)
    # Beside this file stands another `lerobot`: the adapter. Only the pipe is wanted from here.
    sys.path.insert(0, HERE)
    from pipe import pack, receive  # type: ignore[import-not-found]

    sys.path[:] = [folder for folder in sys.path if folder != HERE]
else:
    from openhelix.runtime.robots.pipe import pack, receive


def named(name: str) -> Any:
    """Return what `"module:Class"` names."""
    module, _, member = name.partition(":")
    return getattr(importlib.import_module(module), member)


def make_arm(target: str | None, config_target: str | None, config: Mapping[str, Any]) -> Any:
    """Return a LeRobot `Robot`.

    Args:
        target: `"module:Class"` of it; None takes the arm that `config["type"]` names.
        config_target: of its configuration class; None gives `config` to `target` itself.
        config: its fields, as LeRobot's own command line has them.

    Raises:
        ImportError: LeRobot or a library of the arm is missing.
        ValueError: neither a target nor a type, or a field that does not fit.
    """
    if target and not config_target:
        return named(target)(**config)
    import draccus

    if target:
        assert config_target is not None
        _register("lerobot.cameras")
        return named(target)(draccus.decode(named(config_target), dict(config)))
    if "type" not in config:
        raise ValueError("config: type names the arm, for example so101_follower")
    missing = _register("lerobot.robots", "lerobot.cameras")
    from lerobot.robots import RobotConfig, make_robot_from_config

    known = RobotConfig.get_known_choices()
    if config["type"] not in known:
        raise ValueError(
            f"config: type: {config['type']!r} is none of {', '.join(sorted(known))}"
            + "".join(f"; {name} needs {what}" for name, what in missing.items())
        )
    return make_robot_from_config(draccus.decode(RobotConfig, dict(config)))


def _register(*packages: str) -> dict[str, str]:
    """Import every arm and camera that can be, which registers it; return what the others lack."""
    missing = {}
    for package in packages:
        for found in pkgutil.iter_modules(importlib.import_module(package).__path__):
            if found.ispkg:
                try:
                    importlib.import_module(f"{package}.{found.name}")
                except ImportError as error:
                    missing[found.name] = str(error).splitlines()[0]
    return missing


def features(arm: Any) -> dict[str, Any]:
    """Return the names and shapes that an arm reads and takes; an empty shape is a number."""

    def shapes(of: Mapping[str, Any]) -> dict[str, list[int]]:
        return {k: list(v) if isinstance(v, tuple | list) else [] for k, v in of.items()}

    return {
        "observation": shapes(arm.observation_features),
        "action": shapes(arm.action_features),
        "calibrated": bool(arm.is_calibrated),
    }


def stamps(arm: Any) -> dict[str, float]:
    """Return when each camera took its newest picture, in seconds of `time.perf_counter`.

    That clock is the system's monotonic one, the same in every process of a Linux host. Asked
    before the pictures, which may be newer by then and must not look younger.
    """
    cameras = getattr(arm, "cameras", None) or {}
    found = {name: getattr(camera, "latest_timestamp", None) for name, camera in cameras.items()}
    return {name: stamp for name, stamp in found.items() if isinstance(stamp, float)}


def answer(arm: Any, message: Mapping[str, Any]) -> dict[str, Any]:
    """Carry out one request."""
    call = message["call"]
    if call == "connect":
        arm.connect(calibrate=False)
        return {"calibrated": bool(arm.is_calibrated)}
    if call == "disconnect":
        arm.disconnect()
        return {}
    if call == "observe":
        taken = stamps(arm)
        return {"data": dict(arm.get_observation()), "taken": taken}
    if call == "send":
        return {"sent": dict(arm.send_action(message["action"]) or {})}
    raise ValueError(f"call: {call!r} is unknown")


def serve(pipe: socket.socket, about: Mapping[str, Any]) -> None:
    """Make the arm and answer until the other side is gone, then let go of the arm."""
    try:
        arm = make_arm(about["target"], about["config_target"], about["config"])
        pipe.sendall(pack(features(arm)))
    except Exception as error:
        traceback.print_exc()
        pipe.sendall(pack({"error": _said(error)}))
        return
    try:
        while True:
            message = receive(pipe)
            try:
                reply = answer(arm, message)
            except Exception as error:
                traceback.print_exc()
                reply = {"error": _said(error)}
            pipe.sendall(pack(reply))
    except (EOFError, ConnectionError):
        pass
    finally:
        if arm.is_connected:
            arm.disconnect()


def _said(error: Exception) -> str:
    said = " ".join(str(error).split())
    return f"{type(error).__name__}: {said[:400]}"


def main(arguments: list[str]) -> None:
    """Serve one arm on the socket that the first argument names."""
    descriptor, about = arguments
    with socket.socket(fileno=int(descriptor)) as pipe:
        serve(pipe, json.loads(about))
    sys.stderr.flush()
    os._exit(0)  # camera threads of some drivers do not end with the interpreter


if __name__ == "__main__":
    main(sys.argv[1:])
