"""The process in which the real calvin_env lives; run by path, never imported by the benchmarks.

It may run under another interpreter than the project's (calvin_env needs gym and hydra,
which the project does not), so it uses the standard library, NumPy and calvin_env only.
calvin_env and Bullet print to standard output, hence a socket of its own for the replies; see
`runtime/robots/pipe.py`.

Arguments: descriptor of the socket, folder of the calvin_env checkout, scene, and the
cameras with commas between them.
"""

from __future__ import annotations

import os
import socket
import sys
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

import numpy as np

# By its path, since the interpreter that runs this may lack all that the package imports.
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "runtime" / "robots"))
from pipe import pack, receive  # type: ignore[import-not-found]

sys.path.pop(0)


def make_env(checkout: Path, scene: str, cameras: list[str]) -> Any:
    """Construct calvin_env's own play table with its own configuration."""
    sys.path.insert(0, str(checkout))
    warnings.filterwarnings("ignore")
    import hydra

    overrides = [
        *("cameras=static_and_gripper", f"scene=calvin_scene_{scene}", "use_vr=false"),
        # the configuration asks for coloured logs, one package more that nobody needs
        *("hydra/job_logging=default", "hydra/hydra_logging=default"),
        *(f"~cameras.{name}" for name in ("static", "gripper") if name not in cameras),
    ]
    with hydra.initialize_config_dir(str(checkout / "conf"), version_base="1.1"):
        cfg = hydra.compose("config_data_collection", overrides=overrides)
    return hydra.utils.instantiate(
        cfg.env, show_gui=False, use_vr=False, use_scene_info=True, use_egl=False
    )


def _views(env: Any) -> dict[str, Any]:
    """Field of view (degrees) and OpenGL view matrix (column-major) of each camera."""
    return {
        camera.name: {
            "fov_deg": float(camera.fov),
            "size": [int(camera.height), int(camera.width)],
            "view": np.array(
                getattr(camera, "viewMatrix", getattr(camera, "view_matrix", None)), np.float64
            ),
        }
        for camera in env.cameras
    }


def _action(message: dict[str, Any]) -> Any:
    """The checked action in one of calvin_env's own forms."""
    kind, values, gripper = message["kind"], message["values"], int(message["gripper"])
    if kind == "cartesian_rel":
        return np.append(values, gripper)
    if kind == "cartesian_abs":
        return tuple(values[:3].tolist()), tuple(values[3:].tolist()), gripper
    return {"type": kind, "action": [*values.tolist(), gripper]}


def answer(env: Any, message: dict[str, Any]) -> Any:
    """Carry out one request."""
    call = message["call"]
    if call == "reset":
        return {"obs": env.reset(robot_obs=message["robot_obs"], scene_obs=message["scene_obs"])}
    if call == "step":
        obs, reward, done, info = env.step(_action(message))
        return {"obs": obs, "reward": reward, "done": done, "info": info}
    if call == "advance":
        cameras, env.cameras = env.cameras, []  # calvin_env draws in every step otherwise
        try:
            env.step(_action(message))
        finally:
            env.cameras = cameras
        return {}
    if call == "get_obs":
        return {"obs": env.get_obs()}
    if call == "get_info":
        return {"info": env.get_info()}
    if call == "time_steps":
        hold = np.array([0.0, 0, 0, 0, 0, 0, 1])
        start = time.perf_counter()
        for _ in range(message["count"]):
            env.step(hold)
        return {"seconds": time.perf_counter() - start}
    if call == "frames":
        return {"obs": env.get_obs(), "views": _views(env)}
    raise ValueError(f"call: {call!r} is unknown")


def serve(pipe: socket.socket, checkout: Path, scene: str, cameras: list[str]) -> None:
    """Answer requests until told to close or until the parent is gone."""
    try:
        env = make_env(checkout, scene, cameras)
    except Exception as error:
        traceback.print_exc()
        pipe.sendall(pack({"error": f"{type(error).__name__}: {error}"}))
        return
    pipe.sendall(pack({"ready": True}))
    while True:
        try:
            message = receive(pipe)
        except (EOFError, ConnectionError):
            return
        if message["call"] == "close":
            return
        try:
            reply = answer(env, message)
        except Exception as error:
            traceback.print_exc()
            reply = {"error": f"{type(error).__name__}: {error}"}
        pipe.sendall(pack(reply))


def main(arguments: list[str]) -> None:
    descriptor, checkout, scene, cameras = arguments
    with socket.socket(fileno=int(descriptor)) as pipe:
        serve(pipe, Path(checkout), scene, [name for name in cameras.split(",") if name])
    sys.stderr.flush()
    os._exit(0)  # calvin_env's destructor fails in an interpreter that is shutting down


if __name__ == "__main__":
    main(sys.argv[1:])
