"""Makes pictures of PlayTable with questions and answers, for System 2's base model.

    python -m openhelix.benchmarks.training.collect_talk --out FOLDER            # train, held-out, scene-D
    python -m openhelix.benchmarks.training.collect_talk --out FOLDER --small SUBSET --megabytes 55

    python -m openhelix.benchmarks.training.collect_talk --out FOLDER --pictures-of OTHER

`train` and `held-out` are random states of the training scenes by different seeds; half of the
questions of `held-out` are put in wordings that training never sees. `scene-D` is for
measuring only. Everything follows from the seed and the shard's number, so an interrupted run
resumes, and asking for more pictures keeps the existing ones. What is asked follows from what a
picture shows, which is written beside it: `--pictures-of` asks anew of another folder's pictures,
without drawing one.
"""

from __future__ import annotations

import argparse
import logging
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from openhelix.benchmarks.calvin import goals
from openhelix.benchmarks.calvin.appearance import Appearance
from openhelix.benchmarks.calvin.cameras import SceneRenderer
from openhelix.benchmarks.calvin.captions import StateMaker, facts_of
from openhelix.benchmarks.calvin.scene import BLOCK_SIDE_M, Scene, get_scene, scene_names
from openhelix.benchmarks.calvin.table_talk import COLOURS, KINDS, TableView, labels, talk
from openhelix.system2.prompt import asked_of_robot
from openhelix.system2.vlm_data import (
    GOAL_KINDS,
    Question,
    Record,
    encoded,
    read_about,
    read_shard,
    shards,
    write_about,
    write_shard,
)

log = logging.getLogger(__name__)
FORMAT = 5  # raise it when the same seed would give other pictures or questions
SHARD, STATES_PER_LOOK = 200, 20
BUTTON_YZ_M, SWITCH_YZ_M = (-0.12, 0.48), (0.04, 0.53)
SHUT_IN = 0.06  # share of the states with a block in the closed drawer
TRAIN, HELD_OUT, MEASURED = "train", "held-out", "scene-D"


@dataclass(frozen=True, slots=True)
class TalkPlan:
    """One folder of pictures.

    Attributes:
        scenes: a shard each, in turn; names or scenes of one's own.
        seed: everything that is drawn follows from it.
        random_looks: share of the pictures with random wood, light and noise.
        held_out: share of the questions in wordings kept from training.
    """

    scenes: tuple[str | Scene, ...] = ("A", "B", "C")
    seed: int = 1
    random_looks: float = 0.5
    held_out: float = 0.0

    def about(self) -> dict[str, object]:
        """Return what a folder's record says of it."""
        return {
            "format": FORMAT,
            "scenes": [get_scene(scene).name for scene in self.scenes],
            "seed": self.seed,
            "random_looks": self.random_looks,
            "held_out": self.held_out,
            "kinds": [*KINDS, *GOAL_KINDS],
        }


PLANS = {
    TRAIN: TalkPlan(),
    HELD_OUT: TalkPlan(seed=1001, random_looks=0.25, held_out=0.5),
    MEASURED: TalkPlan(scenes=("D",), seed=1002, random_looks=0.0, held_out=0.5),
}


def point(values: Sequence[float]) -> tuple[float, float, float]:
    """Return three plain numbers."""
    x, y, z = (float(v) for v in values)
    return x, y, z


def plans(scenes: Sequence[str | Scene]) -> dict[str, TalkPlan]:
    """Return the three folders' plans for some training scenes.

    Raises:
        ValueError: scene D is among them: it is measured on and never trained on.
    """
    named = tuple(scenes)
    if any(get_scene(scene).name == "D" for scene in named) or not named:
        raise ValueError("scenes: name one or more to train on, without D, which is measured on")
    return {
        TRAIN: replace(PLANS[TRAIN], scenes=named),
        HELD_OUT: replace(PLANS[HELD_OUT], scenes=named),
        MEASURED: PLANS[MEASURED],
    }


def view_of(truth: dict[str, Any], seen: dict[str, int], scene: Scene) -> TableView:
    """Put a state of `StateMaker` into a view.

    Args:
        truth: what it drew.
        seen: pixels that each colour's block shows.
        scene: where the fixtures are.
    """
    facts = facts_of(truth, seen)
    xyz = {c: point(truth["xyz"][c]) for c in COLOURS}
    places = {c: "gripper" if p == "hand" else p for c, p in facts.places.items()}
    under = {}
    for c in COLOURS:
        if places[c] == "stack":
            others = [o for o in COLOURS if o != c]
            under[c] = min(others, key=lambda o: float(np.hypot(*np.subtract(xyz[o], xyz[c])[:2])))
    return TableView(
        place=places,
        under=under,
        xyz=xyz,
        drawer=facts.drawer,
        door=facts.slider,
        bulb=facts.bulb,
        led=facts.led,
        holds=str(truth["held"]),
        tcp=point(truth["tcp"]),
        spots=spots_of(scene),
        gripper_height=facts.gripper_height,
    )


def spots_of(scene: Scene) -> dict[str, tuple[float, float, float]]:
    """Return where button and switch are, m in W."""
    return {"button": (scene.button_x, *BUTTON_YZ_M), "switch": (scene.switch_x, *SWITCH_YZ_M)}


def view_again(record: Record, scene: Scene) -> TableView:
    """Return what a picture shows by its labels and numbers, as `make_shard` writes them."""
    known = record.labels
    numbers = [0.0 if v is None else float(v) for v in record.numbers]
    xyz = {c: point(numbers[3 * i : 3 * i + 3]) for i, c in enumerate(COLOURS)}
    place = {c: known[f"{c} place"] for c in COLOURS}
    return TableView(
        place=place,
        under={c: _below(c, place, xyz) for c in COLOURS if place[c] == "stack"},
        xyz=xyz,
        drawer=known.get("drawer"),
        door=known.get("door"),
        bulb=known["bulb"],
        led=known["led"],
        holds=known["holds"] if known["holds"] in COLOURS else "",
        tcp=point(numbers[12:15]),
        spots=spots_of(scene),
        gripper_height=known.get("gripper height"),
    )


def _below(
    colour: str, place: Mapping[str, str], xyz: Mapping[str, tuple[float, float, float]]
) -> str:
    """The block under another one: the seen one that is there, else the one that is not seen."""
    others = [c for c in COLOURS if c != colour]
    away = {c: float(np.hypot(*np.subtract(xyz[c], xyz[colour])[:2])) for c in others}
    near = [c for c in others if place[c] != "hidden" and away[c] < BLOCK_SIDE_M]
    return min(near or [c for c in others if place[c] == "hidden"] or others, key=away.__getitem__)


def asked(
    record: Record, scene: Scene, plan: TalkPlan, index: int, row: int
) -> tuple[Question, ...]:
    """Return the questions and instructions of picture `row` of shard `index`.

    An instruction is answered by the plain sentence that is meant.
    """
    rng = np.random.default_rng([plan.seed, index, row, 2])
    questions = [
        Question(q.kind, q.question, q.answer, q.held_out)
        for q in talk(view_again(record, scene), rng, plan.held_out)
    ]
    rng = np.random.default_rng([plan.seed, index, row, 1])
    told = [
        Question(_goal_kind(g), asked_of_robot(g.said), g.plain)
        for g in goals.goals(record.labels, rng)
    ]
    return (*questions, *told)


def _goal_kind(goal: goals.Goal) -> str:
    """Whether it takes a look, names its task, or names nothing that the robot can do."""
    look, told, nothing = GOAL_KINDS
    return nothing if goal.plain == goals.NOTHING else look if goal.looks else told


def make_shard(folder: Path, plan: TalkPlan, index: int, size: int = SHARD) -> None:
    """Draw one shard of `size` pictures."""
    scene = get_scene(plan.scenes[index % len(plan.scenes)])
    rng = np.random.default_rng([plan.seed, index, zlib.crc32(scene.name.encode())])
    maker, renderer = StateMaker(scene, rng), SceneRenderer(scene, ("static",))
    ids = maker.block_ids
    made = []
    for row in range(size):
        if row % STATES_PER_LOOK == 0:
            other = rng.uniform() < plan.random_looks
            look = Appearance.random(int(rng.integers(1 << 30)), scene) if other else None
            renderer.set_appearance(look or Appearance.of(scene))
        state, truth = maker.draw()
        if rng.uniform() < SHUT_IN:
            hidden = maker.shut_in(truth)
            state = state if hidden is None else hidden
        frame = renderer.render(state)["static"]
        seen = {c: int((frame.segmentation == uid).sum()) for c, uid in ids.items()}
        view = view_of(truth, seen, scene)
        numbers = facts_of(truth, seen).numbers
        # Where a block is that cannot be seen is nothing to learn.
        known = [view.place[c] != "hidden" for c in COLOURS for _ in range(3)]
        told = tuple(
            round(v, 4) if i >= len(known) or known[i] else None for i, v in enumerate(numbers)
        )
        told += tuple(round(x, 4) for x, *_ in view.spots.values())
        shown = Record(encoded(frame.rgb), scene.name, (), labels(view), told)
        made.append(replace(shown, questions=asked(shown, scene, plan, index, row)))
    maker.close()
    write_shard(folder, index, made)


def make(folder: Path, plan: TalkPlan, pictures: int) -> None:
    """Draw a folder of at least `pictures` pictures, in whole shards; goes on where it stopped.

    Raises:
        ValueError: the folder was made by another plan.
    """
    about, before = plan.about(), read_about(folder)
    if before and before != about:
        odd = next(key for key in about if before.get(key) != about[key])
        raise ValueError(
            f"data: {folder} was made with {odd} {before.get(odd)!r}, not {about[odd]!r}; "
            "choose another folder or remove it"
        )
    write_about(folder, about)
    there = set(shards(folder))
    for index in range(-(-pictures // SHARD)):
        if index not in there:
            make_shard(folder, plan, index)
            log.info("%s: %d pictures", folder, (index + 1) * SHARD)


def ask_again(source: Path, out: Path, plan: TalkPlan) -> int:
    """Copy a folder's pictures and ask anew what they show; return their number.

    Raises:
        ValueError: the pictures are not this plan's.
    """
    before, about = read_about(source), plan.about()
    odd = [key for key in ("scenes", "seed", "random_looks") if before.get(key) != about[key]]
    if odd:
        raise ValueError(
            f"pictures-of: {source} was made with {odd[0]} {before.get(odd[0])!r}, "
            f"not {about[odd[0]]!r}"
        )
    count = 0
    write_about(out, about)
    for index in shards(source):
        scene = get_scene(plan.scenes[index % len(plan.scenes)])
        records = list(read_shard(source, index))
        write_shard(
            out,
            index,
            [
                replace(record, questions=asked(record, scene, plan, index, row))
                for row, record in enumerate(records)
            ],
        )
        count += len(records)
    return count


def subset(source: Path, out: Path, max_bytes: int, side: int, quality: int = 82) -> int:
    """Copy as many whole shards as fit into `max_bytes`, pictures scaled; return their number.

    Every tenth of it is held-out pictures, so that the copy can be measured by itself.
    """
    total = count = 0
    for name, share in ((HELD_OUT, 0.1), (TRAIN, 1.0)):
        write_about(out / name, read_about(source / name))
        for index in shards(source / name):
            records = []
            for record in read_shard(source / name, index):
                small = record.image().resize((side, side), Image.Resampling.BICUBIC)
                records.append(
                    Record(
                        encoded(small, quality),
                        record.group,
                        record.questions,
                        record.labels,
                        record.numbers,
                    )
                )
            write_shard(out / name, index, records)
            size = sum(f.stat().st_size for f in (out / name).glob(f"{index:05d}.*"))
            if total + size > max_bytes * share:
                for file in (out / name).glob(f"{index:05d}.*"):
                    file.unlink()
                break
            total, count = total + size, count + len(records)
    return count


def fill(options: argparse.Namespace, plan: Mapping[str, TalkPlan]) -> None:
    """Make the three folders that the command line wants.

    Raises:
        ValueError: a folder was made by another plan.
    """
    if options.pictures_of is not None:
        for name, of in plan.items():
            count = ask_again(options.pictures_of / name, options.out / name, of)
            log.info("%s: %d pictures", options.out / name, count)
        return
    # A little of each first: what is measured with is there from the beginning.
    make(options.out / HELD_OUT, plan[HELD_OUT], options.held_out)
    make(options.out / TRAIN, plan[TRAIN], min(3000, options.train))
    make(options.out / MEASURED, plan[MEASURED], options.scene_d)
    make(options.out / TRAIN, plan[TRAIN], options.train)


def main(argv: Sequence[str] | None = None) -> int:
    """Make the three folders, or a small copy of them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--train", type=int, default=24000, help="pictures to train on")
    parser.add_argument("--scenes", default="ABC,R0-R116", help="to train on (ABC,R0-R116)")
    parser.add_argument("--held-out", type=int, default=1200)
    parser.add_argument("--scene-d", type=int, default=600)
    parser.add_argument("--small", type=Path, help="write a small copy of --out there instead")
    parser.add_argument("--megabytes", type=float, default=55.0, help="of the small copy")
    parser.add_argument(
        "--pictures-of", type=Path, help="ask anew of the pictures of this folder's folders"
    )
    parser.add_argument("--side", type=int, default=160, help="of the small copy's pictures")
    options = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    if options.small is not None:
        count = subset(options.out, options.small, int(options.megabytes * 1e6), options.side)
        log.info("%s: %d pictures", options.small, count)
        return 0
    try:
        fill(options, plans(scene_names(options.scenes)))
    except ValueError as error:
        parser.error(str(error))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
