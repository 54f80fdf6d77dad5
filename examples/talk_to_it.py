"""Talk to a running robot: it hears a sentence within a tick, and three words at once.

    python examples/talk_to_it.py ["FIRST SENTENCE" "SECOND"] [section.field=value ...]

Starts `openhelix run --interactive` with the settings that are given, talks to it as anybody could
from another terminal (`openhelix say`), and ends it.
"""

import subprocess
import sys
import time

import openhelix


def until_ready(robot: openhelix.Robot, patience_s: float = 300.0) -> None:
    """Wait until the loop runs."""
    deadline_s = time.monotonic() + patience_s
    while time.monotonic() < deadline_s:
        try:
            if robot.status()["started"]:
                return
        except RuntimeError:  # no run is alive yet
            pass
        time.sleep(0.2)
    raise SystemExit("the robot did not start")


def main(*words: str) -> None:
    settings = [word for word in words if "=" in word]
    sentences = [word for word in words if "=" not in word]
    first, second = sentences or ("open the drawer", "lift the red block")
    given = dict(word.split("=", 1) for word in settings)
    folder = given.get("output.folder", "outputs")
    command = [sys.executable, "-m", "openhelix", "run", "--interactive", "--no-ray", *settings]
    run = subprocess.Popen(command, stdin=subprocess.PIPE)
    try:
        with openhelix.Robot(outputs=folder, who="example") as robot:
            until_ready(robot)
            told = robot.say(first)
            print(f"{told.text!r}: first action after {told.first_action_s} s; {told.answer}")
            time.sleep(1.0)
            print("wait:", robot.say("wait").came_of_it)
            print("go on:", robot.say("go on").came_of_it)
            told = robot.say(second)
            print(f"{told.text!r} instead of {told.replaces!r}")
            print("stop:", robot.say("stop").came_of_it)
            for entry in robot.events(timeout_s=0.5):
                print("  ", entry["line"])
    finally:
        run.communicate(timeout=120)  # the end of its input ends the run


if __name__ == "__main__":
    main(*sys.argv[1:])
