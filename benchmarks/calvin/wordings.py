"""Many ways to say each of the 34 tasks: a grammar of training sentences for System 2.

A pattern is English with choices: `(lift|pick up)`, what may be left out: `[please]`, and names
of other patterns: `<block>`. `say` draws sentences from it: imperatives, polite requests,
passives and wishes, with synonyms, other orders, with and without articles and capitals. Equal
arguments give equal sentences on every machine.

No sentence is one of CALVIN's validation sentences, of CALVIN-E's, or of the development list:
those are for measuring. Only these lists as a whole are compared (`phrases.normalised`); the
grammar was written without them.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence

import numpy as np

from openhelix.benchmarks.calvin.phrases import (
    PhraseError,
    Phrases,
    calvin_e,
    development,
    normalised,
    validation,
)
from openhelix.benchmarks.calvin.tasks import TASK_NAMES, TASKS
from openhelix.runtime.core.plugins import none_of

Rules = Mapping[str, Sequence[str]]
TRIES = 60  # draws for one new sentence

HUES: dict[str, Sequence[str]] = {
    "red": ("red",) * 6
    + (
        *("crimson", "scarlet", "red-coloured", "red colored", "bright red", "ruby", "reddish"),
        *("cherry-coloured", "vermilion"),
    ),
    "blue": ("blue",) * 6
    + (
        *("navy", "azure", "blue-coloured", "blue colored", "dark blue", "cobalt", "bluish"),
        *("indigo", "sapphire blue"),
    ),
    "pink": ("pink",) * 6
    + (
        *("rose-coloured", "rosy", "fuchsia", "pink colored", "light pink", "magenta", "pinkish"),
        *("salmon pink", "rose"),
    ),
}

COMMON: Rules = {
    "thing": (
        "(block|block|block|block|cube|cube|brick|box|object|piece|toy|item|wooden block|cuboid"
        "|piece of wood|thing)",
    ),
    "block": (
        "the <hue> <thing>",
        "the <hue> <thing>",
        "the <hue> <thing>",
        "the <thing> that is <hue>",
        "that <hue> <thing>",
        "the <hue> one",
        "the <thing> which is <hue>",
    ),
    "table": ("the (table|table|table|tabletop|table top|desk|work surface|surface of the table)",),
    "drawer": ("the (drawer|drawer|drawer|drawer|open drawer|drawer of the table|table's drawer)",),
    "cabinet": (
        "the (sliding cabinet|cabinet|slider|cupboard|shelf behind the door|sliding compartment"
        "|cabinet with the sliding door|slider's cabinet|closet|compartment|sliding cupboard)",
    ),
    "door": (
        "the (sliding door|sliding door|slider|door|door of the cabinet|cabinet door|cupboard door"
        "|cabinet's sliding door|slide door)",
    ),
    "drawer_itself": (
        "the (drawer|drawer|drawer|drawer|drawer of the table|table drawer|desk drawer"
        "|drawer under the table|lower drawer)",
    ),
    "bulb": (
        "the (light bulb|light bulb|lightbulb|bulb|yellow light|yellow lamp|lamp|yellow bulb"
        "|light)",
    ),
    "led": (
        "the (led|LED|led light|green light|green led|green lamp|led lamp|little green light"
        "|LED light|green indicator)",
    ),
    "button": ("the (button|button|push button|table's button|button on the table)",),
    "switch": ("the (switch|switch|light switch|lever|slide switch|toggle switch|slider switch)",),
    "held": (
        "(the block|the block|the object|the cube|the piece|it|the thing) "
        "[(you are holding|in your hand|in your gripper|you have grasped|that you hold"
        "|you just picked up|in the gripper|you carry)]",
        "(what you are holding|whatever is in your hand|the held block|the grasped object"
        "|the block held by the gripper|the cube between your fingers)",
    ),
    "right": (
        "to the right",
        "to the right",
        "right",
        "(towards|toward) the right",
        "(rightwards|rightward)",
        "to the right (side|hand side)",
        "to its right",
        "in the right direction of the table",
        "over to the right",
    ),
    "left": (
        "to the left",
        "to the left",
        "left",
        "(towards|toward) the left",
        "(leftwards|leftward)",
        "to the left (side|hand side)",
        "to its left",
        "over to the left",
        "in the left direction of the table",
    ),
    "right_turn": (
        "<right>",
        "<right>",
        "<right>",
        "clockwise",
        "in [the] clockwise direction",
        "(90|ninety) degrees (to the right|clockwise)",
        "by a quarter turn to the right",
    ),
    "left_turn": (
        "<left>",
        "<left>",
        "<left>",
        "(counterclockwise|anticlockwise|counter-clockwise)",
        "in [the] (counterclockwise|anticlockwise) direction",
        "(90|ninety) degrees (to the left|counterclockwise)",
        "by a quarter turn to the left",
    ),
    "take": (
        "(grab|grasp|take|get|take hold of|pick|reach for|seize|grip)",
        "(grab|grasp|take|get|clutch|clasp|snatch|pluck|pinch|catch|secure|capture)",
    ),
    "lift": (
        "(lift|lift|lift up|pick up|raise|take|grab|take up)",
        "(lift|pick up|hoist|elevate|heave|scoop up|snatch|hold up|bring up|pull up|boost)",
    ),
}

# For each family: what is to be done ("do"), in the infinitive; what is to be so ("be"), after
# "should"; what is done ("done"), a clause of its own.
FAMILIES: dict[str, Rules] = {
    "rotate": {
        "spin": (
            "(rotate|rotate|rotate|turn|turn|turn|twist|spin)",
            "(rotate|turn|swivel|pivot|revolve|twirl|reorient|swing around|wheel around|whirl)",
        ),
        "do": (
            "<spin> <block> <turn>",
            "<spin> <block> <turn>",
            "<spin> <block> <turn>",
            "<take> <block> and (rotate|turn|twist|spin) it <turn>",
            "<take> <block>, then (rotate|turn|twist) it <turn>",
            "give <block> a (turn|rotation|twist|spin) <turn>",
            "make <block> (turn|rotate|spin) <turn>",
            "(rotate|turn) <turn> <block>",
            "hold <block> and twist your hand <turn>",
            "change the orientation of <block> by turning it <turn>",
            "turn <block> (around|round|about) <turn>",
            "(change|alter) the (direction|way) <block> (faces|points) by (turning|pivoting) it <turn>",
            "make <block> (face|point) (further|more) to the <side>",
            "<take> <block> and (swivel|pivot|revolve|swing) it <turn>",
            "let <block> (rotate|turn) <turn>",
            "(do|perform) a <side> (turn|rotation) (of|with) <block>",
        ),
        "be": ("(rotated|turned|twisted|spun|swivelled|pivoted|revolved|reoriented) <turn>",),
    },
    "push": {
        "shift": (
            "(push|push|push|slide|slide|shove|move|shift|nudge|drag)",
            "(push|slide|propel|thrust|press|scoot|edge|poke|bump|prod|drive|displace|ease|budge)",
        ),
        "do": (
            "<shift> <block> <way>",
            "<shift> <block> <way>",
            "<shift> <block> <way>",
            "<shift> <block> a (bit|little) <way>",
            "go to <block> and (push|slide|shove|move) it <way>",
            "(push|slide) <way> <block>",
            "make <block> (slide|move|go) <way>",
            "get <block> to (slide|move) <way>",
            "use your (hand|gripper|arm|closed gripper) to (push|slide|move) <block> <way>",
            "(push|slide|move) <block> (along|across|over) <table> <way>",
            "put your hand against <block> and push it <way>",
            "give <block> a push <way>",
            "bring <block> further <way>",
        ),
        "be": (
            "(pushed|slid|shoved|moved|shifted) <way>",
            "(pushed|propelled|nudged|displaced|pressed) <way>",
            "(further|farther) <way>",
        ),
    },
    "move_slider": {
        "do": (
            "(push|slide|move|slide|shift|pull|drag) <door> <way>",
            "(push|slide|move|slide|shift|pull|drag) <door> <way>",
            "(push|slide|move|slide|shift|pull|drag) <door> <way>",
            "(take|grab|grasp|hold) the handle of <door> and (slide|move|push|pull) it <way>",
            "(grasp|grab) <door> [by its handle] and (move|slide|push) it <way>",
            "make <door> (slide|go|move) <way>",
            "(move|push|slide) the (door handle|handle of <door>) <way>",
            "(open|close|shift) <door> <way>",
            "use the handle to (slide|move) <door> <way>",
            "get <door> over to the <side> side",
            "(go to|reach for) <door> and (push|slide|move) it <way>",
            "bring <door> all the way <way>",
            "(shove|roll|glide|haul|tug|press|nudge|propel) <door> <way>",
        ),
        "be": ("(pushed|slid|moved|shifted) <way>", "on the <side> [side]"),
        "subject": ("<door>",),
    },
    "open_drawer": {
        "do": (
            "(open|open up|pull open|pull out|slide open|draw out|pull) <drawer_itself>",
            "(open|open up|pull open|pull out|slide open|draw out|pull) <drawer_itself>",
            "(pull|slide|draw) <drawer_itself> (open|out|towards you)",
            "(take|grab|grasp|hold|use) the (handle|drawer handle|drawer's handle) "
            "(and|to) (pull|open) <drawer_itself> [open|out]",
            "(grab|pull) the (drawer handle|handle of <drawer_itself>) (and open it|outwards|out)",
            "pull [on] the handle of <drawer_itself>",
            "make <drawer_itself> open",
            "(get|have) <drawer_itself> (open|opened)",
            "(go|reach) to <drawer_itself> and (open it|pull it open|pull it out)",
            "slide <drawer_itself> out [of the table|all the way]",
            "(tug|yank|haul|draw) [on] <drawer_itself> (open|out|until it is open)",
            "(unclose|extend|draw open) <drawer_itself>",
        ),
        "be": ("(opened|pulled out|pulled open|open|slid open)",),
        "subject": ("<drawer_itself>",),
    },
    "close_drawer": {
        "do": (
            "(close|shut|push shut|push in|slide shut|push closed|push back) <drawer_itself>",
            "(close|shut|push shut|push in|slide shut|push closed|push back) <drawer_itself>",
            "(push|slide|move) <drawer_itself> (shut|closed|in|back in|back)",
            "(take|grab|use) the (handle|drawer handle|drawer's handle) "
            "(and|to) (close|shut) <drawer_itself>",
            "push (against|on) the (front|handle) of <drawer_itself> (until it is closed|to shut it)",
            "push the handle of <drawer_itself> [in|inwards]",
            "make <drawer_itself> close",
            "(get|have) <drawer_itself> (closed|shut)",
            "(go|reach) to <drawer_itself> and (close it|push it shut|shut it)",
            "push <drawer_itself> (into|back into) the (table|desk) [completely]",
            "(shove|press|thrust|slam|ease|return) <drawer_itself> (shut|closed|in|home)",
        ),
        "be": ("(closed|shut|pushed in|pushed shut|slid shut)",),
        "subject": ("<drawer_itself>",),
    },
    "lift_table": {
        "from": ("(from|off) <table>", "(lying|that lies|that is|standing|resting) on <table>"),
        "do": (
            "<lift> <block> <from>",
            "<lift> <block> <from>",
            "<lift> <block> <from>",
            "<take> <block> (lying |)on <table> and (lift|raise|pick) it up",
            "<take> <block> <from>",
            "(lift|pick|raise) <block> up [<from>]",
            "(lift|pick up|raise) <block>",
            "<take> <block> and (lift|raise) it [up|from <table>|off <table>]",
            "go to <table> and (lift|pick up|grab) <block>",
            "from <table>, (lift|pick up|take) <block>",
            "(collect|fetch) <block> from <table>",
            "get <block> off <table>",
            "(hoist|elevate|heave|snatch|pluck) <block> (from|off) <table>",
        ),
        "be": ("(lifted|picked up|raised|taken) [from <table>|off <table>]",),
        "place": ("on <table>",),
    },
    "lift_slider": {
        "from": (
            "(from|out of|from inside|from within) <cabinet>",
            "(from|out of) <cabinet>",
            "(in|inside) <cabinet>",
            "that is (in|inside) <cabinet>",
        ),
        "do": (
            "<lift> <block> <from>",
            "<lift> <block> <from>",
            "<lift> <block> <from>",
            "<take> <block> (in|inside) <cabinet> and (lift|raise|pick) it up",
            "(take|get|bring|pull|pick) <block> out of <cabinet>",
            "(lift|pick|raise) <block> up from <cabinet>",
            "go to <cabinet> and (lift|pick up|grab|take out) <block>",
            "from <cabinet>, (lift|pick up|take out) <block>",
            "(reach|go) (into|inside) <cabinet> and (grab|take|lift|pick up) <block>",
            "(collect|fetch) <block> from <cabinet>",
            "remove <block> from <cabinet>",
            "(extract|withdraw|recover|snatch|pluck|fish out) <block> from <cabinet>",
        ),
        "be": ("(lifted|picked up|taken|removed) (from|out of) <cabinet>",),
        "place": ("(in|inside) <cabinet>",),
    },
    "lift_drawer": {
        "from": (
            "(from|out of|from inside|from within) <drawer>",
            "(from|out of) <drawer>",
            "(in|inside) <drawer>",
            "that is (in|inside) <drawer>",
        ),
        "do": (
            "<lift> <block> <from>",
            "<lift> <block> <from>",
            "<lift> <block> <from>",
            "<take> <block> (in|inside) <drawer> and (lift|raise|pick) it up",
            "(take|get|bring|pull|pick) <block> out of <drawer>",
            "(lift|pick|raise) <block> up from <drawer>",
            "go to <drawer> and (lift|pick up|grab|take out) <block>",
            "from <drawer>, (lift|pick up|take out) <block>",
            "(reach|go) (into|inside) <drawer> and (grab|take|lift|pick up) <block>",
            "(collect|fetch) <block> from <drawer>",
            "remove <block> from <drawer>",
            "(extract|withdraw|recover|snatch|pluck|fish out) <block> from <drawer>",
        ),
        "be": ("(lifted|picked up|taken|removed) (from|out of) <drawer>",),
        "place": ("(in|inside) <drawer>",),
    },
    "place_in_slider": {
        "into": ("(in|into|inside|inside of) <cabinet>",),
        "do": (
            "(put|place|put|place|store|lay|set|drop) <held> <into>",
            "(put|place|put|place|store|lay|set|drop) <held> <into>",
            "(put|place|lay|set) <held> down <into>",
            "(move|bring|carry|take) <held> (to|into) <cabinet> [and (put it down|let go|release it)]",
            "(let go of|release|leave) <held> <into>",
            "go to <cabinet> and (put|place|drop) <held> (there|inside|in it)",
            "(stow|keep|deposit) <held> <into>",
            "(insert|tuck|stash|position|lower|rest|leave) <held> <into>",
        ),
        "be": ("(put|placed|stored|dropped|left) <into>",),
        "subject": ("<held>",),
    },
    "place_in_drawer": {
        "into": ("(in|into|inside|inside of) <drawer>",),
        "do": (
            "(put|place|put|place|store|lay|set|drop) <held> <into>",
            "(put|place|put|place|store|lay|set|drop) <held> <into>",
            "(put|place|lay|set) <held> down <into>",
            "(move|bring|carry|take) <held> (to|into) <drawer> [and (put it down|let go|release it)]",
            "(let go of|release|leave) <held> <into>",
            "go to <drawer> and (put|place|drop) <held> (there|inside|in it)",
            "(stow|keep|deposit) <held> <into>",
            "(insert|tuck|stash|position|lower|rest|leave) <held> <into>",
        ),
        "be": ("(put|placed|stored|dropped|left) <into>",),
        "subject": ("<held>",),
    },
    "stack_block": {
        "other": ("(another|the other|a different|a second) (block|cube|one|piece|object|brick)",),
        "do": (
            "stack (the|both|two|some) (blocks|cubes|bricks|objects|pieces)",
            "stack (the|two) (blocks|cubes|bricks) [on top of each other|on each other|up]",
            "stack <held> (on|onto|on top of|upon) <other>",
            "(put|place|set|lay) <held> (on|onto|on top of|upon) <other>",
            "(put|place|set|lay) <held> (on|onto|on top of|upon) <other>",
            "(put|place|set) one (block|cube|brick) (on|on top of|onto) <other>",
            "(make|build) a (stack|tower|pile) [of|out of|with] [the|two] (blocks|cubes|bricks)",
            "(release|let go of) <held> on top of <other>",
            "(move|bring|carry) <held> (on top of|onto) <other>",
            "pile (the blocks|the cubes|one block on the other|the bricks up)",
            "(rest|position|lower|pile|deposit) <held> (on|onto|on top of|above) <other>",
        ),
        "be": ("(stacked|put|placed|set) (on|onto|on top of) <other>",),
        "subject": ("<held>",),
    },
    "unstack_block": {
        "upper": (
            "the (top|upper|topmost|uppermost|stacked) (block|cube|brick|piece|one|object)",
            "the (block|cube|brick) (on top|at the top|on top of the other one)",
            "the (block|cube) that (sits|is|lies) on (another|the other) (block|one|cube)",
        ),
        "do": (
            "unstack (the|those|these) (blocks|cubes|bricks|objects)",
            "unstack <upper>",
            "(remove|take off|lift off|take away|pick up|take|grab) <upper>",
            "(remove|take off|lift off|take away|pick up|take|grab) <upper>",
            "(take|lift|get) <upper> off [the (stack|pile|tower|lower one|block below)]",
            "(remove|lift|take) <upper> from the (stack|pile|tower|lower block|block below it)",
            "(take|break) (apart|down) the (stack|tower|pile) [of (blocks|cubes)]",
            "take (a block|the block|one cube) (off|from) the (stack|tower|pile)",
            "(undo|dismantle) the (stack|tower|pile) [of (blocks|cubes)]",
            "(disassemble|separate|demolish) the (stack|tower|pile) [of (blocks|cubes)]",
            "(separate|detach|pull off|pluck|hoist) <upper> [from the (one|block) below]",
        ),
        "be": ("(removed|taken off|unstacked|lifted off|taken away) [from the (stack|tower)]",),
        "subject": ("<upper>",),
    },
    "turn_on_lightbulb": {
        "do": (
            "(turn|switch|put) on <bulb>",
            "(turn|switch|put) on <bulb>",
            "(turn|switch) <bulb> on [with <switch>|by (moving|pushing) <switch> up]",
            "(light|light up|illuminate|activate|power on|power up) <bulb>",
            "(move|push|slide|flip|pull|lift|toggle) <switch> (up|upwards|upward|to the top)",
            "(move|push|slide|flip|pull|lift|toggle) <switch> (up|upwards|upward|to the top)",
            "(move|push|slide|flip) up <switch>",
            "use <switch> to (turn|switch) on <bulb>",
            "(flip|toggle|slide|push) <switch> [up] (to|so that you) (turn|switch) on <bulb>",
            "(flip|toggle|slide|push) <switch> to (turn|switch) <bulb> on",
            "make <bulb> (shine|glow|light up|go on)",
            "(get|have) <bulb> (on|lit|switched on)",
        ),
        "be": ("(on|turned on|switched on|lit|shining)",),
        "subject": ("<bulb>",),
    },
    "turn_off_lightbulb": {
        "do": (
            "(turn|switch|put) off <bulb>",
            "(turn|switch|put) off <bulb>",
            "(turn|switch) <bulb> off [with <switch>|by (moving|pushing) <switch> down]",
            "(put out|darken|extinguish|deactivate|power off|shut off|power down) <bulb>",
            "(move|push|slide|flip|pull|press|toggle) <switch> (down|downwards|downward|to the bottom)",
            "(move|push|slide|flip|pull|press|toggle) <switch> (down|downwards|downward|to the bottom)",
            "(move|push|slide|flip) down <switch>",
            "use <switch> to (turn|switch) off <bulb>",
            "(flip|toggle|slide|push) <switch> [down] (to|so that you) (turn|switch) off <bulb>",
            "(flip|toggle|slide|push) <switch> to (turn|switch) <bulb> off",
            "make <bulb> (go dark|go out|stop shining|go off)",
            "(get|have) <bulb> (off|dark|switched off)",
        ),
        "be": ("(off|turned off|switched off|dark|put out)",),
        "subject": ("<bulb>",),
    },
    "turn_on_led": {
        "do": (
            "(turn|switch|put) on <led>",
            "(turn|switch|put) on <led>",
            "(turn|switch) on <led>",
            "(turn|switch) <led> on [with <button>|by pressing <button>]",
            "(light|light up|illuminate|activate|power on|power up) <led>",
            "(press|push|push down|press down|hit|use|tap) <button> to (turn|switch) on <led>",
            "(press|push|push down|press down|hit|use|tap) <button> to (turn|switch) <led> on",
            "(press|push|hit|tap) <button> (so that|until) <led> (lights up|goes on|is on|shines)",
            "make <led> (shine|glow|light up|go on)",
            "(get|have) <led> (on|lit|switched on)",
        ),
        "be": ("(on|turned on|switched on|lit|shining)",),
        "subject": ("<led>",),
    },
    "turn_off_led": {
        "do": (
            "(turn|switch|put) off <led>",
            "(turn|switch|put) off <led>",
            "(turn|switch) off <led>",
            "(turn|switch) <led> off [with <button>|by pressing <button>]",
            "(put out|darken|extinguish|deactivate|power off|shut off|power down) <led>",
            "(press|push|push down|press down|hit|use|tap) <button> to (turn|switch) off <led>",
            "(press|push|push down|press down|hit|use|tap) <button> to (turn|switch) <led> off",
            "(press|push|hit|tap) <button> (so that|until) <led> (goes dark|goes out|is off|goes off)",
            "make <led> (go dark|go out|stop shining|go off)",
            "(get|have) <led> (off|dark|switched off)",
        ),
        "be": ("(off|turned off|switched off|dark|put out)",),
        "subject": ("<led>",),
    },
    "push_into_drawer": {
        "any": ("(the|a|that) (block|block|cube|object|piece|toy|item|brick)",),
        "do": (
            "(push|slide|shove|sweep|push|slide) <any> (into|in|inside) <drawer>",
            "(push|slide|shove|sweep|push|slide) <any> (into|in|inside) <drawer>",
            "(push|slide|shove|sweep|nudge) <any> (until|so that|so) it (falls|drops) into <drawer>",
            "make <any> (fall|drop|slide) into <drawer> [by pushing it]",
            "(push|slide|shove) <any> (off|from|over the edge of) <table> into <drawer>",
            "let <any> (fall|drop|slide) into <drawer> by (pushing|sliding|shoving) it",
            "go to <any> and (push|slide|shove) it into <drawer>",
            "move <any> into <drawer> (by pushing [it]|with a push|without lifting it)",
            "(tip|knock|brush|bump|thrust|propel|roll|press|drive) <any> into <drawer>",
        ),
        "be": ("(pushed|slid|shoved|swept) into <drawer>",),
        "subject": ("<any>",),
    },
}

FRAMES: Rules = {
    "sentence": ("<do>",) * 8 + ("<before> <do>",) * 6 + ("<do>[,] <after>",) * 2 + ("<wish>",) * 3,
    "before": (
        "please",
        "please",
        "(could|can|would|will) you [please]",
        "(now|next|then|first)[,]",
        "(go|go and|go ahead and)",
        "(I want|I need|I'd like|I would like|we want) you to",
        "robot, [please]",
        "(your task|your job|the task|the goal) is to",
        "(you should|you have to|you need to|you must|try to|let's|just|kindly)",
        "use (your|the) (gripper|arm|hand) to",
        "it is time to",
    ),
    "after": ("please", "now", "for me", "(thanks|thank you)", "if you can", "carefully"),
    "wish": (
        "<subject> (should|must|has to|needs to|ought to) be <be>",
        "(I want|I need|I'd like|I would like) <subject> (to be |)<be>",
        "(make sure [that]|see to it that) <subject> is <be>",
        "(could|can) <subject> be <be>[, please]",
        "(we want|let's have|get) <subject> <be>",
    ),
    "subject": ("<block>",),
}


# What no task is: things that are not there, what is not to be done, and what robots cannot do.
NOTHING: Rules = {
    "sentence": (
        "<denied>",
        "<denied>",
        "<absent>",
        "<absent>",
        "<absent>",
        "<before> <absent>",
        "<idle>",
        "<idle>",
        "<before> <idle>",
    ),
    "denied": (
        "(do not|don't|never|please do not|please don't|you must not|you should not) <act>",
        "(do not|don't) <act> (now|yet|please)",
        "(avoid|refrain from) touching <known>",
        "(leave|keep) <known> (as it is|alone|where it is)",
        "(there is no need|it is not necessary) to <act>",
        "I do not want you to <act>",
        "stop, do not <act>",
    ),
    "absent": (
        "(lift|pick up|take|grab|push|rotate|turn|move|slide|stack|raise) the <missing>",
        "(push|slide|move|rotate|turn) the <missing> to the (left|right)",
        "(lift|take|grab|pick up) the <missing> (from|out of) the (table|drawer|cabinet|shelf)",
        "(put|place) the <missing> (in|into|on) the (drawer|cabinet|table|shelf)",
        "(open|close|shut) the (window|fridge|oven|curtain|garage|suitcase|book|lid|bottle)",
        "turn (on|off) the (radio|television|fan|heating|music|computer|oven|red light|blue light)",
        "(press|push) the (red|blue|black|doorbell) button",
    ),
    "missing": (
        "(green|yellow|black|white|purple|orange|brown|grey) (block|cube|box|brick|object|toy)",
        "(banana|apple|cup|mug|bottle|spoon|plate|book|pen|ball|hammer|phone|chair|car|hat)",
        "(green|yellow|black|white|purple|orange) one",
    ),
    "idle": (
        "(sing|dance|jump|wave|smile|whistle|sleep|relax|wait|stop|think|hurry up|come here)",
        "(sing a song|tell me a joke|say hello|make some coffee|wash the dishes|cook dinner)",
        "(what time is it|how are you|who are you|what can you do|what is your name)",
        "(where is my key|how is the weather|is it raining|what do you see)",
        "(good morning|hello there|thank you very much|well done|never mind|I am bored)",
        "(water the plants|feed the cat|call my mother|sweep the floor|clean the window)",
        "(do nothing|just look around|stay where you are|keep still|hold on|take a break)",
        "(write a letter|read the news|play some music|count to ten|solve this equation)",
    ),
    "known": (
        "(the drawer|the switch|the button|the sliding door|the lamp|the (red|blue|pink) block)",
    ),
}


def say_nothing(count: int, seed: int = 0) -> tuple[str, ...]:
    """Return `count` different sentences that name none of the tasks.

    Raises:
        PhraseError: fewer can be found.
    """
    rng = np.random.default_rng([seed, len(TASK_NAMES)])
    known, found = set(reserved()), list[str]()
    for _ in range(count * TRIES):
        if len(found) == count:
            return tuple(found)
        task = TASK_NAMES[int(rng.integers(len(TASK_NAMES)))]
        rules = {**rules_of(task), **NOTHING, "act": ("<do>",)}
        text = " ".join(expand("<sentence>", rules, rng).split())
        if rng.random() < 0.3:
            text = text[0].upper() + text[1:]
        if (key := normalised(text)) not in known:
            known.add(key)
            found.append(text)
    raise PhraseError(f"wordings: {count} sentences for no task wanted, {len(found)} found")


def family_of(task: str) -> str:
    """Return the key of `FAMILIES` that says a task."""
    head, *_, tail = task.split("_")
    if head == "lift":
        return f"lift_{tail}"
    if task.startswith("move_slider"):
        return "move_slider"
    return head if head in ("rotate", "push") and task not in FAMILIES else task


def rules_of(task: str) -> dict[str, Sequence[str]]:
    """Return all patterns of a task.

    Raises:
        PhraseError: there is no such task.
    """
    if task not in TASKS:
        raise PhraseError(f"task: {none_of(task, TASK_NAMES)}")
    rules: dict[str, Sequence[str]] = {**COMMON, **FRAMES, **FAMILIES[family_of(task)]}
    color = TASKS[task].target.removeprefix("block_")
    if color in HUES:
        rules["hue"] = HUES[color]
    side = next((s for s in ("right", "left") if s in task.split("_")), "")
    if side:
        rules |= {"side": (side,), "way": rules[side], "turn": rules[f"{side}_turn"]}
    return rules


def expand(pattern: str, rules: Rules, rng: np.random.Generator) -> str:
    """Return one sentence of a pattern."""
    while True:
        found = re.search(r"<(\w+)>|\(([^()\[\]<>]*)\)|\[([^()\[\]<>]*)\]", pattern)
        if found is None:
            return pattern
        name, choice, optional = found.groups()
        if name is not None:
            options = rules[name]
            text = options[int(rng.integers(len(options)))]
        else:
            parts = (choice if choice is not None else optional).split("|")
            text = parts[int(rng.integers(len(parts)))]
            if choice is None and rng.random() < 0.5:
                text = ""
        pattern = pattern[: found.start()] + text + pattern[found.end() :]


def drawn(task: str, rng: np.random.Generator) -> str:
    """Return one sentence for a task, as somebody might say it."""
    text = expand("<sentence>", rules_of(task), rng)
    text = re.sub(r"\s+([,.])", r"\1", " ".join(text.split())).strip(" ,")
    text = re.sub(r"\ba (?=[aeiou])", "an ", text)
    text = re.sub(r"\b(\w+)( \1\b)+", r"\1", text)
    style = rng.random(3)
    if style[0] < 0.08:  # as on a telegram
        text = re.sub(r"\bthe ", "", text)
    if style[1] < 0.3:
        text = text[0].upper() + text[1:]
    return text + "." if style[2] < 0.1 else text


@functools.cache
def reserved() -> frozenset[str]:
    """Return every sentence, normalised, that is for measuring and must not be trained on."""
    lists = (validation(), calvin_e(), development())
    return frozenset(normalised(s) for each in lists for said in each.values() for s in said)


def say(task: str, count: int, seed: int = 0) -> tuple[str, ...]:
    """Return `count` different sentences for a task.

    Raises:
        PhraseError: no such task, or fewer than `count` sentences can be found.
    """
    if task not in TASKS:
        raise PhraseError(f"task: {none_of(task, TASK_NAMES)}")
    rng = np.random.default_rng([seed, TASK_NAMES.index(task)])
    known, found = set(reserved()), list[str]()
    for _ in range(count * TRIES):
        if len(found) == count:
            break
        text = drawn(task, rng)
        if (key := normalised(text)) not in known:
            known.add(key)
            found.append(text)
    if len(found) < count:
        raise PhraseError(f"wordings: {count} sentences for {task} wanted, {len(found)} found")
    return tuple(found)


def wordings(count: int, seed: int = 0) -> Phrases:
    """Return `count` sentences for each of the 34 tasks.

    Raises:
        PhraseError: so many cannot be found.
    """
    return {task: say(task, count, seed) for task in TASK_NAMES}
