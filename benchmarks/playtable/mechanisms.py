"""What drawer, door, button and switch do: joints from an observation, lights from joints."""

from __future__ import annotations

from typing import Any

from benchmarks.playtable.physics import BUTTON, DRAWER, SLIDE, SWITCH, World
from benchmarks.playtable.scene import BUTTON_THRESHOLD_M, SWITCH_THRESHOLD_M
from runtime.types import F64

Logic = tuple[bool, bool, bool, bool, bool]


class Mechanisms:
    """The logic on top of one world's table.

    Attributes:
        bulb, led: whether each light is on.
        button_on, switch_on: logical states.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self.clear()

    def clear(self) -> None:
        """Everything off, as in a world just built."""
        self.bulb = self.led = self.button_on = self.switch_on = False
        self._button_was_down = False

    def put(self, joints: F64, lights: F64) -> None:
        """Put slide, drawer, button and switch (4) m and bulb and LED (2) somewhere.

        In calvin_env's order: doors, lights, button (its state is the LED's), switch (off).
        """
        slide, drawer, button, switch = joints
        self._world.set_table_joint(SLIDE, slide)
        self._world.set_table_joint(DRAWER, drawer)
        self.bulb, self.led = bool(lights[0]), bool(lights[1])
        self._world.set_table_joint(BUTTON, button)
        self.button_on = self.led
        self._button_was_down = bool(button > BUTTON_THRESHOLD_M)
        self._world.set_table_joint(SWITCH, switch)
        self.switch_on = False

    def step(self) -> None:
        """Button: each press toggles the LED. Switch: the bulb follows its position."""
        down = self._world.table_joint(BUTTON) > BUTTON_THRESHOLD_M
        if down and not self._button_was_down:
            self.button_on = not self.button_on
            self.led = self.button_on
        self._button_was_down = down
        up = self._world.table_joint(SWITCH) > SWITCH_THRESHOLD_M
        if up and not self.switch_on:
            self.bulb = True
        elif self.switch_on and not up:
            self.bulb = False
        self.switch_on = up

    def values(self) -> list[float]:
        """Slide, drawer, button, switch (m), bulb, LED (0 or 1)."""
        joints = [self._world.table_joint(j) for j in (SLIDE, DRAWER, BUTTON, SWITCH)]
        return [*joints, float(self.bulb), float(self.led)]

    def logic(self) -> Logic:
        """What joints alone do not tell; `set_logic` takes it back."""
        return self.bulb, self.led, self.button_on, self.switch_on, self._button_was_down

    def set_logic(self, logic: Logic) -> None:
        """Return to what `logic` returned."""
        self.bulb, self.led, self.button_on, self.switch_on, self._button_was_down = logic

    def info(self) -> dict[str, Any]:
        """The doors, buttons, switches and lights of calvin_env's scene info."""
        slide, drawer, button, switch, bulb, led = self.values()
        return {
            "doors": {
                "base__slide": {"current_state": slide},
                "base__drawer": {"current_state": drawer},
            },
            "buttons": {
                "base__button": {"joint_state": button, "logical_state": int(self.button_on)}
            },
            "switches": {
                "base__switch": {"joint_state": switch, "logical_state": int(self.switch_on)}
            },
            "lights": {
                "lightbulb": {"logical_state": int(bulb)},
                "led": {"logical_state": int(led)},
            },
        }
