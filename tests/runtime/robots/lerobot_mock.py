"""A LeRobot arm without hardware, of LeRobot's own classes; imported by the interpreter that has it."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from lerobot.robots import Robot, RobotConfig


class SlowCamera:
    """Takes a picture now and then, and gives the last one until the next (`read_latest`)."""

    def __init__(self, hz: float) -> None:
        self.period_s, self.latest_timestamp = 1 / hz, None
        self.frame = np.zeros((48, 64, 3), np.uint8)
        self._on = False

    def connect(self) -> None:
        self._on = True
        self._take(0)
        threading.Thread(target=self._run, daemon=True).start()

    def disconnect(self) -> None:
        self._on = False

    def read_latest(self) -> Any:
        return self.frame

    def _take(self, shade: int) -> None:
        self.frame = np.full((48, 64, 3), shade % 256, np.uint8)
        self.latest_timestamp = time.perf_counter()

    def _run(self) -> None:
        shade = 0
        while self._on:
            time.sleep(self.period_s)
            shade += 1
            self._take(shade)


@RobotConfig.register_subclass("gantry_mock")
@dataclass
class GantryConfig(RobotConfig):
    calibrated: bool = True
    camera_hz: float = 10.0
    start: dict[str, float] = field(
        default_factory=lambda: {"j1": 0.0, "j2": -200.0, "j3": 550.0, "gripper": 100.0}
    )


class Gantry(Robot):
    config_class = GantryConfig
    name = "gantry_mock"

    def __init__(self, config: GantryConfig) -> None:
        super().__init__(config)
        self.config, self._on = config, False
        self.now = {f"{name}.pos": value for name, value in config.start.items()}
        self.cameras = {"front": SlowCamera(config.camera_hz)}

    @property
    def observation_features(self) -> dict[str, Any]:
        return dict.fromkeys(self.now, float) | {"front": (48, 64, 3)}

    @property
    def action_features(self) -> dict[str, Any]:
        return dict.fromkeys(self.now, float)

    @property
    def is_connected(self) -> bool:
        return self._on

    @property
    def is_calibrated(self) -> bool:
        return self.config.calibrated

    def connect(self, calibrate: bool = True) -> None:
        assert not calibrate
        self.cameras["front"].connect()
        self._on = True

    def calibrate(self) -> None:
        raise AssertionError("calibration moves the arm by hand")

    def configure(self) -> None:
        pass

    def get_observation(self) -> dict[str, Any]:
        return dict(self.now) | {"front": self.cameras["front"].read_latest()}

    def send_action(self, action: dict[str, float]) -> dict[str, float]:
        for key, value in action.items():
            self.now[key] += float(np.clip(value - self.now[key], -30.0, 30.0))
        return dict(self.now)

    def disconnect(self) -> None:
        self.cameras["front"].disconnect()
        self._on = False
