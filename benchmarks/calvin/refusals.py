"""Sentences that name no task, and sentences that do although they look as if they did not.

System 2 has to tell "do not open the drawer", "lift the green block" and "sing" from what it can
act on. `refusals` draws the former from a grammar, by kind; `requests` the latter: besides what
`wordings` says, sentences with a "not" that ask for something all the same, and references that
only the picture resolves ("lift the block on the far left"). Every sentence comes with the
pattern that it was drawn from, so that a fit can be tried on patterns it has not seen.

`held_out` is for measuring alone: written without the grammar, in other patterns and, but for
what is on the table, other words. No drawn sentence is among those, nor in any other list that
is for measuring.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from openhelix.benchmarks.calvin.phrases import (
    FOLDER,
    PhraseError,
    development_nothing,
    normalised,
    training,
)
from openhelix.benchmarks.calvin.tasks import TASK_NAMES
from openhelix.benchmarks.calvin.wordings import TRIES, Rules, drawn, expand, reserved, rules_of

PLAIN = ("errand", "talk", "noise")  # kinds that are about something else
HELD_OUT = FOLDER / "refusals.json"
# Things that are not on the table, and no words for what is; none is in a list for choosing by.
NOUNS: tuple[str, ...] = tuple(json.loads((FOLDER / "nouns.json").read_text(encoding="utf-8")))


@dataclass(frozen=True, slots=True)
class Said:
    """A sentence, what kind it is, and the pattern that it was drawn from."""

    text: str
    kind: str
    pattern: str


# Kinds of what names no task. Each pattern is drawn equally often within its kind; `<do>`,
# `<subject>` and `<be>` are a task's own, so that only the frame around them says no.
KINDS: Mapping[str, Sequence[str]] = {
    "denied": (
        "(do not|don't|never|do never) <do>",
        "(please do not|please don't|robot, do not|now don't) <do>",
        "(do not|don't) <do> (now|yet|please|any more|again)",
        "you (must not|should not|may not|mustn't|shouldn't|are not to|are not allowed to) <do>",
        "I (do not|don't) want you to <do>",
        "we (do not|don't) (want|need) to <do>",
        "(there is no need|no need|it is not necessary|it is not the time) to <do>",
        "you (need not|do not have to|don't need to) <do>",
        "(it is forbidden|it is not allowed|it is wrong|I told you not) to <do>",
        "(whatever you do|I beg you|listen), (do not|don't|never) <do>",
        "(make sure|see to it|take care) that you (do not|don't|never) <do>",
        "(be careful|try|remember|take care) not to <do>",
        "(I changed my mind|stop|no|wait), (do not|don't) <do>",
        "nobody (should|may|is allowed to|has to) <do>",
        "<subject> (must not|should not|shouldn't|may not|mustn't|need not) be <be>",
        "I (do not|don't) want <subject> (to be |)<be>",
        "(avoid|stop|refrain from|quit) touching <known>",
        "(leave|keep) <known> (as it is|alone|where it is|untouched|in its place)",
        "(do not|don't|never) (touch|move|use|come near|look at) <known>",
        "<known> (must not|should not) be (touched|moved|used)",
        "(it is a bad idea|it is not a good idea|it makes no sense|we decided not) to <do>",
        "it is (too early|too dangerous|pointless|useless|unnecessary|impossible|illegal) to <do>",
        "(without my permission|unless I say so|for heaven's sake), (do not|never|don't) <do>",
        "<subject> is (not to be|never to be|not supposed to be) <be>",
        "the last thing (I want|we need) is (that you|for you to) <do>",
        "(ignore|disregard|reject) the (request|order|wish) to <do>",
        "(I|we) (said|asked you|warned you|told you|begged you) not to <do>",
        "(you cannot|you can't|you won't|you will not|nobody can) <do>",
        "<subject> needs no (help|moving|touching|attention)",
        "(better|best|rather) not <do>",
        "(who said|since when) (you should|we) <do>",
        "(how dare you|you wouldn't dare to|have you no shame that you) <do>",
        "(it went wrong when you|you made a mistake when you|sorry that you) <do>",
        "neither <do> nor (move|wait|turn|look)",
        "(prevent|stop|protect) <subject> from being <be>",
        "(I am happy|we are fine|it is better) with <subject> not <be>",
        "(you tried to|he used to|she always wanted to|they failed to) <do>",
        "(no|not) <known>[, please|, thanks|!]",
        "anything (but|except) <known>",
    ),
    "colour": (
        "(lift|pick up|take|grab|raise) <other_block>",
        "(lift|pick up|take|grab|raise) <other_block> (from|out of|off) <place>",
        "(push|slide|shove|move) <other_block> to the <way>",
        "(rotate|turn|twist|spin) <other_block> to the <way>",
        "(rotate|turn) <other_block> (clockwise|counterclockwise|by ninety degrees)",
        "(put|place|store) <other_block> (in|into|inside) <place>",
        "(stack|put) <other_block> on (the other one|another block|the red block|the blue block)",
        "(push|sweep|slide) <other_block> into the drawer",
        "<before> (lift|pick up|take|grab) <other_block>",
        "<before> (push|turn|rotate|slide) <other_block> to the <way>",
        "<other_block> (should|must) be (lifted|pushed to the <way>|rotated to the <way>)",
        "turn (on|off) the (red|blue|pink|purple|orange|white) (light|lamp|led)",
        "(press|push|hit) the (red|blue|black|yellow|white) button",
        "(open|close) the (red|green|blue|black|white|second) drawer",
    ),
    "thing": (
        "(lift|pick up|take|grab|raise|hold) <missing>",
        "(lift|pick up|take|grab|fetch) <missing> (from|out of|off) <place>",
        "(push|slide|shove|move|drag) <missing> to the <way>",
        "(rotate|turn|twist|spin) <missing> to the <way>",
        "(put|place|store|lay) <missing> (in|into|inside|on) <place>",
        "(stack|pile) <missing> on (the block|the table|another one)",
        "<before> (lift|take|grab|push|rotate|move) <missing>",
        "<missing> (should|must) be (lifted|moved|pushed to the <way>|put into the drawer)",
        "(bring|give|hand|show) me <missing>",
        "(push|sweep|slide) <missing> into the drawer",
        "(open|close|shut|lock) <fixture>",
        "<before> (open|close|shut) <fixture>",
        "(turn|switch) (on|off) <device>",
        "(turn|switch) <device> (on|off)",
        "<before> (turn|switch) (on|off) <device>",
        "(press|push) the (doorbell|bell|key|pedal|space bar|alarm|elevator button)",
    ),
    "misuse": (
        "(open|close|shut|unlock|switch on|switch off|press) <a_block>",
        "(stack|twist|spin) (the drawer|the sliding door|the table|the lamp)",
        "(lift|pick up|carry|throw) (the table|the drawer|the sliding door|the lamp|the cabinet)",
        "put (the drawer|the lamp|the table|the button) (in|into|on) (the cabinet|the drawer|<a_block>)",
        "(turn|switch) (on|off) (the drawer|<a_block>|the table|the sliding door|the cabinet)",
        "(break|smash|cut|burn|eat|paint|wash|weigh|sell|buy|lick|melt|bury|draw|heat) <known>",
        "(throw|kick|drop|toss) <a_block> (out of the window|on the floor|away|into the air)",
        "<before> (break|paint|wash|eat|burn|clean|repair|measure) <known>",
        "(wrap|fill|dry|photograph|count|smell|describe|name) <known>",
        "(kiss|tickle|sew|drill|staple|bake|fry|ride|pet|feed|phone|read|play|wear|drink) <known>",
        "(pour|mix|pierce|squash|crush|stretch|knead|hunt|chase|arrest|thank|praise) <known>",
        "(repaint|dye|wax|oil|tape|chain|rent|steal|lend|ship|scratch|boil|pump up|plant) <known>",
        "<before> (squash|kiss|feed|steal|scratch|bake|pour|read|ride|sell|plant) <known>",
        "(turn|make|change) <known> into (a|an|the) <noun>",
        "(put|hang|pour|spread|draw) (a|the|some) <noun> on <known>",
        "use <known> as (a|the) <noun>",
    ),
    "errand": (
        "<deed>",
        "<before> <deed>",
        "<deed>[,] (please|now|for me)",
        "(I want|I need|I'd like|we want) you to <deed>",
        "(sing|dance|jump|wave|smile|whistle|sleep|relax|wait|stop|think|walk|run|swim|laugh|cough)",
        "<before> (sing|dance|jump|wave|smile|sleep|relax|wait|think|walk|run|speak|laugh)",
        "(do nothing|just look around|stay where you are|keep still|hold on|take a break|rest)",
        "(go|walk|drive|fly|move) (to the kitchen|outside|upstairs|to the station|away|home)",
        "(follow me|come here|come back|hurry up|slow down|be quiet|calm down|wake up|go on|try again)",
    ),
    "talk": (
        "(hello|hi|good morning|good evening|hello there|dear robot|hey) [robot|everybody]",
        "(thank you|thanks|well done|never mind|sorry|all right|great work|bye|yes|no|okay)",
        "(what|who|why|how|when) (is|are|was) (that|this|it|you|the weather|the matter|your name)",
        "(what|how) (time is it|do you feel|old is the robot|can you do|many blocks are there)",
        "(where|what colour|how big|how heavy) is (the drawer|<a_block>|the lamp|the table|my key)",
        "is (the drawer|the lamp|<a_block>|the sliding door) (open|on|red|there|heavy|lit|left)",
        "(do|can|did) you (see|like|remember|know|hear) (me|<known>|this|the table|what I said)",
        "(I|we) (like|see|saw|remember|painted|bought|made) <known>",
        "<known> is (nice|on the table|made of wood|heavy|old|from last year|over there|my favourite)",
        "(I am|we are|she is) (bored|tired|hungry|happy|in a hurry|at home|not sure)",
        "(it is|was it) (raining|late|too cold|monday|very quiet|time for lunch|a pity)",
        "the (robot|arm|gripper|camera|hand) is (broken|ready|nice|too slow|made of steel)",
        "<missing> is (nice|on the table|gone|in the kitchen|too expensive|mine)",
        "(which|whose|what) (block|drawer|lamp|switch|one) (is|was) (it|that|yours|broken|the best)",
        "(have|has|had) (you|anyone|he|she) (ever|already) (seen|liked|bought|used) <known>",
        "(I think|I believe|they say|it seems) <known> (is|was) (broken|old|pretty|dirty|small|mine)",
        "(why|when|how) (did|does|do) (you|it|they|<known>) (work|break|fall|stop|shine)",
        "<known> and <known> (are|look|seem) (alike|nice|old|the same|different)",
        "(my|your|her) (brother|friend|teacher|boss) (likes|sold|made|painted|has) <known>",
        "there (is|was) (a|no) <noun> (behind|near|below|inside) <known>",
        "(the weather|this room|the music|my day|your voice|the food) is (bad|lovely|strange|loud)",
    ),
    "noise": (
        "<letters>",
        "<letters> <letters> <letters>",
        "<letters> the <letters>",
        "(the|a|of|to the|and|with|in) (the|of|and|it|which)",
        "<word> <word> <word>",
        "<word> <word> <word> <word> <word>",
        "<word>",
        "the <word> of the <word> is <word>",
        "(one|two|three|seven) (two|nine|five|zero) (four|six|eight|three)",
        "(red|left|table|block|drawer|right|on|button) (of|and|or) (red|left|right|why|then|seven)",
        "(test|testing|check|error|undefined|null|none|instruction|lorem ipsum|abc|xyz)",
    ),
}  # fmt: skip

WORDS: Rules = {
    "noun": NOUNS,
    "way": ("(left|right)",),
    "place": ("the (table|drawer|cabinet|shelf|desk|slider)",),
    "known": (
        "(the drawer|the switch|the button|the sliding door|the lamp|the light bulb|the LED)",
        "the (red|blue|pink) (block|cube)",
    ),
    "a_block": ("the (red|blue|pink) (block|cube|one)", "the block"),
    "tint": (
        "(green|yellow|black|white|purple|orange|brown|grey|gray|emerald|olive|lime|mustard)",
        "(green|yellow|black|white|purple|orange|brown|grey|dark green|light green|bright yellow)",
        "(ivory|tan|charcoal|amber|ochre|plum|striped|transparent|colourless|snow white|checkered)",
    ),
    "other_block": (
        "the <tint> (block|block|cube|box|brick|object|toy|piece|one)",
        "the <tint> (block|cube)",
        "the (block|cube|thing) that is <tint>",
        "(a|that|this) <tint> (block|cube|brick)",
    ),
    "missing": (
        "(the|the|the|a|my|that|this|your|one) <noun>",
        "(the|the|the|a|my|that|this|your|one) <noun>",
        "(the|the|the|a|my|that|this|your|one) <noun>",
        "the (big|small|old|new|heavy|round|red|blue|pink|wooden|other|left) <noun>",
        "the <tint> (ball|cup|bottle|box|book|car)",
        "(the|the|a|my|that) (banana|apple|cup|mug|bottle|spoon|plate|book|pen|ball|hammer|phone"
        "|chair|car|hat|knife|fork|shoe|glove|coin|stone|key|pencil|eraser|towel|sponge|pan|pot)",
        "(the|the|a|my|that) (tomato|carrot|potato|egg|cookie|cake|bread|orange|lemonade|tea|soup"
        "|cat|dog|mouse|bird|horse|flower|tree|leaf|doll|teddy bear|train|boat|bicycle|drum|guitar)",
        "(the|the|a|my|that) (shirt|sock|jacket|bag|wallet|watch|ring|newspaper|letter|envelope"
        "|candle|clock|vase|mirror|picture|pillow|blanket|broom|bucket|ladder|screw|nail|wrench)",
        "the (pyramid|cylinder|sphere|cone|triangle|ring|disk|rope|stick|wire|tube|tape|battery)",
    ),
    "fixture": (
        "the <noun>",
        "the (window|fridge|oven|curtain|garage|suitcase|book|lid|bottle|gate|box|tent|jar|mailbox"
        "|washing machine|car door|wardrobe|trash can|tap|valve|folder|file|browser|trunk|cage)",
    ),
    "device": (
        "the (radio|television|fan|heating|music|computer|oven|engine|camera|printer|phone|stove"
        "|alarm clock|coffee machine|water|dishwasher|laptop|air conditioner|speaker|projector"
        "|street lamp|headlights|ceiling light|kitchen light|kettle|torch|screen|robot)",
    ),
    "deed": (
        "(find|buy|draw|cook|carry|clean|describe|hide|count|sell|touch|watch) (the|a|my) <noun>",
        "(talk to|think of|look for|walk to|play with|sit on|pay for) (the|a|my) <noun>",
        "(sing a song|tell me a joke|say hello|make some coffee|wash the dishes|cook dinner)",
        "(water the plants|feed the cat|call my mother|sweep the floor|clean the window|make the bed)",
        "(write a letter|read the news|play some music|count to ten|solve this equation|spell my name)",
        "(bake|slice|peel|boil|fry|taste|season) (a cake|the bread|an apple|some potatoes|an egg)",
        "(fold|iron|wash|hang up|mend) (the shirt|my clothes|the towel|a blanket|the laundry)",
        "(buy|order|rent|sell|deliver) (milk|a ticket|a car|some flowers|a book|two chairs)",
        "(repair|install|charge|update|reboot) (the computer|the phone|my bicycle|the software)",
        "(show|tell|explain to|teach|remind) me (the way|a story|the rules|how to swim|of the date)",
        "(draw|paint|photograph|sketch) (a house|a circle|the garden|my portrait|a tree)",
        "(translate|summarise|print|email|delete) (this page|the report|the letter|all files)",
        "(shake|clap|wave|raise) your (hands|head|arms)",
        "(drive|fly|ride|steer) (the car|a plane|the bus|a horse) [to town]",
        "(polish|scrub|dust|vacuum|mop) the (floor|carpet|stairs|room|kitchen|bathroom)",
        "(catch|chase|feed|walk|brush) the (dog|cat|ball|rabbit|fish)",
    ),
    "letters": (
        "(qwe|asd|zxc|blar|fro|snu|gri|kli|mup|tre|vog|wib|xan|yol|zim)"
        "(ft|gle|nk|rp|st|zzle|mble|dge|ck|x|jk|vv|oo|ipt|arg)",
    ),
    "word": (
        "<noun>",
        "(cloud|yesterday|seven|never|green|because|music|mountain|maybe|slowly|paper|under|winter)",
        "(history|river|purple|before|nothing|someone|coffee|twelve|happy|between|market|always)",
        "(engine|blue|window|quickly|perhaps|forest|number|without|island|table|morning|question)",
    ),
}  # fmt: skip

# What names a task although it says "not", or has more around it than it needs.
ALTHOUGH: Sequence[str] = (
    "<do>, (but|and) (do not|don't) (touch|move) anything else",
    "(why don't you|why not|do not hesitate to|don't forget to|do not wait any longer and) <do>",
    "<subject> is not <be> yet, so <do>",
    "(don't just stand there|do not stop now|no more waiting|nothing else matters), <do>",
    "(I can't do it myself|my arm is not long enough|I do not have a free hand), <do>",
    "(if it is no trouble|if you don't mind|unless you are busy)[,] <do>",
    "<do> (without hurry|without touching the rest|and nothing else|, not more than that)",
    "(I am not patient|I have no time|it is not hard): <do>",
    "(somebody|someone|he|she) (wants|asked) <subject> (to be |)<be>",
    "(it would be (good|nice|great)|I would not mind) (to have|having) <subject> <be>",
    "<subject>: (it has to be|I want it|let it be) <be>",
    "(is it possible|would it be possible|are you able) to <do>",
    "(the next step|the plan|my wish|the only thing left) is to <do>",
    "(can|could|may|would) I ask you to <do>",
    "(let me see you|show me how you|I am waiting for you to|it is your turn to) <do>",
    # Words that are not of the table do not make it nonsense.
    "(for the sake of|because of|as a favour to|in exchange for) (the|my|a) <noun>, <do>",
    "(my <noun> is late|I am busy with the <noun>|the <noun> can wait): (please |)<do>",
    "<do>, (said the <noun>|I promise you a <noun>|as quick as a <noun>|you clever <noun>)",
    "(like|gently as|careful as) a <noun>, <do>",
)
# Other words for what the table has and for what can be done; nothing else changes its meaning.
SYNONYMS: Mapping[str, Sequence[str]] = {
    "lift": ("heave", "elevate", "scoop up", "pluck", "uplift"),
    "pick up": ("scoop up", "gather", "pluck", "lift out"),
    "push": ("thrust", "prod", "propel", "bump", "press"),
    "rotate": ("pivot", "revolve", "whirl", "swing", "reorient"),
    "slide": ("glide", "draw", "drag", "ease"),
    "open": ("pull out", "extend", "unclose", "uncover"),
    "close": ("shut", "push home", "seal"),
    "grab": ("clutch", "clasp", "snatch", "catch"),
    "take": ("fetch", "collect", "carry", "obtain"),
    "put": ("set", "deposit", "drop", "rest"),
    "turn on": ("activate", "enable", "power up", "start", "ignite"),
    "turn off": ("deactivate", "disable", "power down", "shut off"),
    "switch on": ("activate", "power up", "start"),
    "switch off": ("deactivate", "power down", "shut down"),
    "press": ("depress", "hit", "poke", "punch"),
    "block": ("chunk", "slab", "lump of wood", "wooden thing", "little box"),
    "cube": ("chunk", "dice-shaped block", "small block", "wooden cube"),
    "table": ("bench", "counter", "platform", "work top"),
    "drawer": ("tray", "pull-out", "bottom drawer", "sliding box"),
    "cabinet": ("locker", "rack", "cubby", "closet"),
    "sliding door": ("shutter", "sliding panel", "screen door"),
    "light bulb": ("glow lamp", "incandescent bulb", "round lamp", "bulb light"),
    "led": ("diode", "indicator", "signal light", "little lamp"),
    "button": ("knob", "push-button", "round button"),
    "the switch": ("the toggle", "the lever", "the bar", "that switch"),
    "your hand": ("your claw", "your fist", "your fingers", "the end effector"),
    "red": ("ruby", "cherry", "vermilion", "brick red"),
    "blue": ("cobalt", "sapphire", "royal blue", "sky blue"),
    "pink": ("magenta", "rosé", "pale red", "hot pink"),
    "please": ("kindly", "pretty please", "be so good and"),
}
REWORDED = 0.35  # share of the sentences about the table that get other words
REFERRING: Rules = {
    "whose": (
        "(on the far left|at the left end|farthest left|on the left side of the others)",
        "(on the far right|at the right end|farthest right|on the right side of the others)",
        "(in the middle of the three|with one on each side|in between)",
        "(beside|next to|close to|by|not far from) the (button|switch|lamp switch|drawer handle)",
        "(that nothing is on|you can see|that is not in the drawer|which is outside the cabinet)",
        "(in the open drawer|behind the sliding door|on the tabletop|nearest to (you|the hand))",
    ),
    "which": (
        "(the|whichever) (block|cube|brick) [that is|which lies] <whose>",
        "(the|whichever) (block|cube) <whose>",
        "(any|some|a|the other|the nearest|the closest|the only|the last) (block|cube)",
    ),
    "do": (
        "(lift|pick up|take|grab|raise) <which>",
        "(lift|pick up|take|grab|raise) <which>",
        "(push|slide|shove|move) <which> to the (left|right)",
        "(rotate|turn|twist) <which> to the (left|right)",
        "(change|flip|reverse|invert) the state of the (lamp|light bulb|LED|green light|drawer)",
        "(change|toggle|flip) the (light bulb|bulb|green lamp|light switch|led light)",
        "(operate|work|flip|actuate) the (switch|lever|button)",
        "turn the (lamp|bulb|LED) on if it is off and off if it is on",
        "(move|push|slide|bring) the (sliding door|door) to the (opposite|other) (end|side|position)",
        "if the drawer is (open, close it|shut, open it), (otherwise|else) (open|close) it",
        "(open or close the drawer|change the drawer), (whichever is possible|as it needs)",
    ),
}  # fmt: skip


def refusals(count: int, seed: int = 0) -> tuple[Said, ...]:
    """Return `count` different sentences that name no task, as many of each kind as of another.

    Raises:
        PhraseError: so many cannot be found.
    """
    rng, known = np.random.default_rng([seed, 7]), set(for_measuring())
    kinds, found = tuple(KINDS), list[Said]()
    for number in range(count):
        kind = kinds[number % len(kinds)]
        found.append(_new(kind, KINDS[kind], number // len(kinds), WORDS, rng, known))
    return tuple(found)


def nothing(rng: np.random.Generator) -> str:
    """Return one sentence that names no task: any kind alike, any pattern within it."""
    kind = tuple(KINDS)[int(rng.integers(len(KINDS)))]
    patterns = KINDS[kind]
    turn = int(rng.integers(len(patterns)))
    return _new(kind, patterns, turn, WORDS, rng, set(for_measuring())).text


def although(task: str, rng: np.random.Generator) -> str:
    """Return one sentence that names a task although it says "not" or has more around it.

    Raises:
        PhraseError: no such task.
    """
    pattern = ALTHOUGH[int(rng.integers(len(ALTHOUGH)))]
    while True:
        text = reworded(_expanded(pattern, WORDS, rng, task), rng)
        if normalised(text) not in for_measuring():
            return text


def requests(count: int, seed: int = 0) -> tuple[Said, ...]:
    """Return `count` different sentences that name a task, three quarters as `wordings` says them.

    The others are of `ALTHOUGH` and of `REFERRING`. The training sentences come first.

    Raises:
        PhraseError: so many cannot be found.
    """
    rng, known = np.random.default_rng([seed, 8]), set(for_measuring())
    found = [Said(s, "plain", task) for task, said in training().items() for s in said]
    known |= {normalised(one.text) for one in found}
    frames = ("<do>", "<before> <do>", "<do>[,] <after>")
    for number in range(len(found), count):
        turn = number // 8
        if number % 8 == 0:
            made = _new("although", ALTHOUGH, turn, WORDS, rng, known)
        elif number % 8 == 1:
            patterns = REFERRING["do"]
            extra = {**REFERRING, "do": (patterns[turn % len(patterns)],)}
            made = _new("referring", frames, turn // len(patterns), extra, rng, known)
            made = Said(made.text, made.kind, patterns[turn % len(patterns)])
        else:
            task = TASK_NAMES[number % len(TASK_NAMES)]
            made = _new("wording", ("",), 0, {}, rng, known, task)
        found.append(made)
    return tuple(found[:count])


def _new(
    kind: str,
    patterns: Sequence[str],
    turn: int,
    extra: Rules,
    rng: np.random.Generator,
    known: set[str],
    task: str = "",
) -> Said:
    """Return a sentence that is not among the known ones, and add it to them.

    Args:
        patterns: in turn; one whose sentences are used up gives way to the next.
        turn: which comes first.
        extra: rules beside those of a task drawn at random.
        task: draw a sentence of `wordings` for it instead.

    Raises:
        PhraseError: all of them are used up.
    """
    for ahead in range(len(patterns)):
        pattern = patterns[(turn + ahead) % len(patterns)]
        for _ in range(TRIES):
            text = drawn(task, rng) if task else _expanded(pattern, extra, rng)
            text = reworded(text, rng) if kind not in PLAIN else text
            if (key := normalised(text)) not in known:
                known.add(key)
                return Said(text, kind, task or pattern)
    raise PhraseError(f"refusals: no new sentence {task or kind!r} in {TRIES} draws")


def reworded(text: str, rng: np.random.Generator) -> str:
    """Return a sentence, in some cases with other words for what it is about."""
    if rng.random() >= REWORDED:
        return text
    for word, others in SYNONYMS.items():
        if rng.random() < 0.6:
            other = others[int(rng.integers(len(others)))]
            text = re.sub(rf"\b{word}\b", other, text, count=1, flags=re.IGNORECASE)
    return text


def _expanded(pattern: str, extra: Rules, rng: np.random.Generator, task: str = "") -> str:
    """Return a sentence of a pattern, its `<do>` and `<be>` those of a task; "" for any."""
    task = task or TASK_NAMES[int(rng.integers(len(TASK_NAMES)))]
    text = " ".join(expand(pattern, {**rules_of(task), **extra}, rng).split())
    text = text.replace(" ,", ",").replace(",,", ",")
    style = rng.random(2)
    text = text[0].upper() + text[1:] if style[0] < 0.3 else text
    return text + "." if style[1] < 0.15 else text


@functools.cache
def for_measuring() -> frozenset[str]:
    """Return every sentence, normalised, that nothing may be trained on."""
    nothing = [*development_nothing(), *(s for said in held_out().values() for s in said)]
    return reserved() | {normalised(sentence) for sentence in nothing}


def held_out() -> dict[str, tuple[str, ...]]:
    """Return the sentences that name no task and are for measuring, by kind."""
    content = json.loads(HELD_OUT.read_text(encoding="utf-8"))
    return {kind: tuple(sentences) for kind, sentences in content.items()}
