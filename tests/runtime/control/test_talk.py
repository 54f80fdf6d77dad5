"""Talking with a robot: what is said takes effect at the next tick, and everybody is told."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from openhelix.benchmarks.calvin.phrases import TRAINING
from openhelix.runtime.control.assembly import ControlStack
from openhelix.runtime.control.episodes import Assignment, task_rows
from openhelix.runtime.control.loop import Tick
from openhelix.runtime.control.talk import KEPT, Journal, Talk, word_of
from openhelix.runtime.core.config import SENTENCE_CHARS, ConfigError, checked_sentence, load
from tests.runtime.control.test_loop import GOAL, TASKS, make

NEAR, FAR = (f"reach {x} {y} {z}" for x, y, z in GOAL.values())
never = threading.Event().is_set


def at(stack: ControlStack, *sayings: tuple[int, str, str]) -> list[Tick]:
    """Let (tick, text, who) be said right after that tick; return the ticks as they come."""
    ticks: list[Tick] = []

    def subscriber(tick: Tick) -> None:
        ticks.append(tick)
        for index, text, who in sayings:
            if index == tick.index:
                stack.episode_runner.talk.say(text, who)

    stack.loop.subscribers.append(subscriber)
    return ticks


def entries(stack: ControlStack, *kinds: str) -> list[tuple[str, str]]:
    found = stack.episode_runner.journal.since(0)
    return [(e.kind, e.text) for e in found if not kinds or e.kind in kinds]


def test_a_new_instruction_takes_effect_at_the_next_tick_and_voids_the_old_plan() -> None:
    stack = make("tasks.steps_limit=40")
    ticks = at(stack, (10, NEAR, "anna"))
    results = stack.episode_runner.run([Assignment("", FAR)], never)
    assert [(r.instruction, r.reason) for r in results] == [
        (FAR, "replaced"),
        (NEAR, "step limit"),
    ]
    before, after = ticks[9].observation, ticks[10].observation
    assert after.instruction_id == before.instruction_id + 1
    assert ticks[10].sent.instruction_id == after.instruction_id
    assert stack.loop.chunks.counters.rows_voided > 0
    assert results[0].env_steps == 10 and len(ticks) == 50  # no tick was lost between the two
    # It went to the second place, not to the first.
    assert ticks[-1].observation.tcp_pose[:3] == pytest.approx(GOAL["near"], abs=0.03)


def test_a_sentence_of_ones_own_is_never_failed_and_the_world_says_what_it_saw() -> None:
    stack = make("tasks.steps_limit=60")
    (result,) = stack.episode_runner.run([Assignment("", NEAR)], never)
    assert result.success is None and result.reason == "step limit"
    assert [seen.task for seen in result.seen] == ["near"]
    assert 15 <= result.seen[0].steps <= 25
    assert ("seen", "near") in entries(stack)
    assert stack.episode_runner.judged == 0
    rows = task_rows([result])
    assert rows["n_success"] == 0 and rows["tasks"][0]["seen"][0]["task"] == "near"
    line = next(e for e in stack.episode_runner.journal.since(0) if e.kind == "seen").line()
    assert line == f"near after {result.seen[0].steps} steps"


def test_a_list_can_say_after_how_many_steps_the_next_one_comes() -> None:
    stack = make("tasks.steps_limit=20", "tasks.stop_at_failure=true")
    begun = [Assignment("far", FAR, replaced_after=6), Assignment("near", NEAR)]
    results = stack.episode_runner.run(begun, never)
    assert next((r.task, r.success, r.reason, r.env_steps) for r in results) == (
        "far",
        None,  # what it would have come to nobody knows; the list goes on
        "replaced",
        6,
    )
    assert results[1].task == "near" and results[1].success


def test_what_a_person_says_replaces_the_rest_of_a_list() -> None:
    stack = make("tasks.steps_limit=20")
    at(stack, (5, FAR, "anna"))
    results = stack.episode_runner.run(TASKS, never)
    assert [(r.task, r.success, r.reason) for r in results] == [
        ("near", None, "replaced"),  # nobody can say whether it would have been done
        ("", None, "step limit"),
    ]
    assert stack.episode_runner.chains == []


def test_of_two_who_talk_at_once_the_last_one_wins_and_both_are_told() -> None:
    stack = make("tasks.steps_limit=15")
    talk = stack.episode_runner.talk
    told: list[dict[str, Any]] = []

    def subscriber(tick: Tick) -> None:
        if tick.index == 4:
            told.append(talk.say(NEAR, "anna"))
            told.append(talk.say(FAR, "ben"))

    stack.loop.subscribers.append(subscriber)
    results = stack.episode_runner.run([Assignment("", "reach 0 0 0.6")], never)
    assert [r.instruction for r in results] == ["reach 0 0 0.6", FAR]
    assert told[0]["replaces"] == "reach 0 0 0.6"
    assert (told[1]["replaces"], told[1]["replaces_who"]) == (NEAR, "anna")
    said = [e for e in stack.episode_runner.journal.since(0) if e.kind == "said"]
    assert [(e.who, e.said) for e in said] == [("anna", 1), ("ben", 2)]
    assert [e.said for e in stack.episode_runner.journal.since(0) if e.kind == "acting"] == [0, 2]


def test_wait_and_go_on() -> None:
    stack = make("tasks.steps_limit=60")
    runner = stack.episode_runner
    runner._frozen = False  # as on the wall clock, where time goes on while the robot waits
    ticks = at(stack, (10, "Wait, please!", "anna"), (20, "go on", "anna"))
    (result,) = runner.run([Assignment("", FAR)], never)
    held = ticks[10:20]
    assert {(t.state, t.reason) for t in held} == {("hold", "told to wait")}
    still = [t.sent.pose[:3].tolist() for t in held]
    assert still[2:] == [still[-1]] * len(still[2:])
    assert ticks[20].state == "run"
    assert result.hold_steps == 0  # waiting when told to is nobody's fault
    assert [seen.task for seen in result.seen] == ["far"]
    assert entries(stack, "held") == [
        ("held", "holds still until told to go on"),
        ("held", "goes on"),
    ]


@pytest.mark.parametrize("stay", [True, False])  # whoever said "stop" may say what to do instead
def test_stop_stands_still_drops_the_instruction_and_go_on_takes_it_up_again(stay: bool) -> None:
    stack = make("tasks.steps_limit=40")
    runner = stack.episode_runner
    runner._frozen = False
    ticks = at(stack, (10, "stop", "anna"), (20, "go on", "ben"), (70, "stop", "ben"))
    stops: list[str] = stack.loop.robot.stops  # type: ignore[attr-defined]
    before = len(stops)
    stack.loop.subscribers.append(lambda t: runner.talk.close() if t.index == 80 else None)
    results = runner.run([Assignment("", FAR)], never, stay=stay)
    assert [r.reason for r in results] == ["stopped by anna", "step limit"]
    assert [r.instruction for r in results] == [FAR, FAR]
    assert {t.state for t in ticks[10:20]} == {"stop"}
    assert stops[before:][:1] == ["told to stop"]
    assert ticks[21].state == "run" and not stack.loop.stopped
    assert ("held", f"takes up again: {FAR}") in entries(stack)


def test_a_robot_without_an_instruction_holds_still_and_asks_nobody() -> None:
    stack = make("tasks.steps_limit=5")
    runner = stack.episode_runner
    runner._frozen = False
    ticks = at(stack, (12, NEAR, "anna"))
    stack.loop.subscribers.append(lambda t: runner.talk.close() if t.index == 30 else None)
    results = runner.run([Assignment("", FAR)], never, stay=True)
    assert [r.instruction for r in results] == [FAR, NEAR]
    idle = ticks[5:12]
    assert {(t.state, t.reason) for t in idle} == {("wait", "nothing to do")}
    assert all(t.new_latent is None and t.latent_age_s is None for t in idle)
    assert ticks[12].state == "run"  # the tick after it was said
    assert len(ticks) == 30  # and it ends when nobody is left


def test_nothing_stops_a_robot_that_has_nothing_to_do() -> None:
    # Much longer than System 2 may be silent while an instruction is followed.
    stack = make("tasks.steps_limit=5", "safety.latent_max_age_s=0.1", "safety.latent_grace_s=0.1")
    runner = stack.episode_runner
    runner._frozen = False
    at(stack, (600, NEAR, "anna"))
    stack.loop.subscribers.append(lambda t: runner.talk.close() if t.index == 620 else None)
    results = runner.run([], never, stay=True)
    assert [r.reason for r in results] == ["step limit"]
    assert not stack.loop.safety.stops


def test_in_lockstep_time_stands_still_while_nothing_is_to_be_done() -> None:
    stack = make("tasks.steps_limit=5")
    runner = stack.episode_runner
    ticks = at(stack)
    thread = threading.Thread(target=lambda: runner.run([], never, stay=True))
    thread.start()
    time.sleep(0.3)
    assert not ticks
    runner.talk.say(NEAR, "anna")
    deadline_s = time.monotonic() + 20
    while len(runner.results) < 1 and time.monotonic() < deadline_s:
        time.sleep(0.01)
    runner.talk.close()
    thread.join(20)
    assert not thread.is_alive() and len(ticks) == 5


def test_a_wait_that_nobody_can_end_ends_itself() -> None:
    stack = make("control.hold_limit_s=1")
    stack.episode_runner.talk.close()
    at(stack, (3, "wait", "anna"))
    (result,) = stack.episode_runner.run([Assignment("", FAR)], never)
    assert result.reason == "told to wait, and nobody is left to say go on"
    stack = make("control.hold_limit_s=1")
    stack.episode_runner._frozen = False
    stack.episode_runner.talk.close()
    at(stack, (3, "wait", "anna"))
    (result,) = stack.episode_runner.run([Assignment("", FAR)], never)
    assert result.reason == "held still too long: told to wait"


def test_who_leaves_a_robot_that_was_told_to_wait_ends_its_work() -> None:
    stack = make("tasks.steps_limit=60")
    runner = stack.episode_runner
    runner._frozen = False
    ticks = at(stack, (3, "wait", "anna"))
    stack.loop.subscribers.append(lambda t: runner.leave() if t.index == 8 else None)
    (result,) = runner.run([Assignment("", FAR)], never, stay=True)
    assert result.reason == "told to wait, and nobody is left to say go on"
    assert len(ticks) == 8 and not runner.interrupted


@pytest.mark.parametrize("stay", [True, False])
def test_a_run_is_interrupted_also_while_nothing_is_to_be_done(stay: bool) -> None:
    stack = make("tasks.steps_limit=5")
    runner = stack.episode_runner
    runner._frozen = False
    ticks = at(stack)
    todo = [Assignment("", FAR)]
    runner.run(todo, lambda: len(ticks) >= 9, stay=stay)
    rows = task_rows(runner.results, runner.interrupted)
    assert [row["reason"] for row in rows["tasks"]] == ["step limit"]
    assert rows["interrupted"] is stay  # without anybody to wait for it has done all


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("go on", "has nothing to go on with; say what it is to do"),
        ("wait", "follows no instruction; it holds still anyway"),
    ],
)
def test_words_that_find_nothing_to_do_say_so(word: str, told: str) -> None:
    stack = make()
    runner = stack.episode_runner
    runner._frozen = False
    at(stack, (3, word, "anna"))
    stack.loop.subscribers.append(lambda t: runner.talk.close() if t.index == 6 else None)
    runner.run([], never, stay=True)
    assert ("held", told) in entries(stack)


def test_safety_is_that_of_any_run() -> None:
    stack = make()
    at(stack, (5, FAR, "anna"))
    stop_at: Callable[[Tick], None] = lambda t: (  # noqa: E731
        stack.loop.watchdog.order_stop("the button") if t.index == 8 else None
    )
    stack.loop.subscribers.append(stop_at)
    results = stack.episode_runner.run([Assignment("", NEAR)], never, stay=True)
    assert results[-1].reason == "safe stop: operator (the button)" and stack.loop.stopped


def test_the_first_action_is_timed_from_when_it_was_said() -> None:
    stack = make("lockstep.latency_steps=6", "tasks.steps_limit=20")
    at(stack, (10, NEAR, "anna"))
    stack.episode_runner.run([Assignment("", FAR)], never)
    acting = [e for e in stack.episode_runner.journal.since(0) if e.kind == "acting"]
    # One period until the tick that heard it, six until its latent.
    assert acting[1].seconds == pytest.approx(7 / 30, abs=1e-3)
    assert acting[1].line() == "first action after 0.23 s"


# Sentences ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("stop", "stop"),
        ("STOP!", "stop"),
        ("please wait", "wait"),
        ("wait, please", "wait"),
        ("Go on.", "go on"),
        ("stopp", "stop"),
        ("Stpo!", "stop"),
        ("wiat", "wait"),
        ("hodl on", "wait"),
        ("don't move", "stop"),
        ("stop the drawer from closing", ""),
        ("drop it", ""),
        ("open it", ""),
        ("lift the arm", ""),
        ("wait for the red block", ""),
        ("open the drawer", ""),
    ],
)
def test_three_words_are_the_runtimes_and_no_others(text: str, word: str) -> None:
    assert word_of(text) == word


def test_no_instruction_of_the_bench_is_taken_for_a_word() -> None:
    told = [text for texts in json.loads(TRAINING.read_text()).values() for text in texts]
    assert len(told) > 300 and not [text for text in told if word_of(text)]


def test_what_is_nearly_go_on_is_asked_back_and_a_slip_of_stop_is_told() -> None:
    with pytest.raises(ConfigError, match=r"^text: 'go onn': did you mean 'go on'\?$"):
        Talk().say("go onn", "anna")
    stack = make("tasks.steps_limit=12")
    at(stack, (4, "stopp", "anna"))
    stack.episode_runner.talk.close()  # nobody will say more: the run ends
    stack.episode_runner.run([Assignment("", FAR)], never)
    told = '"stopp" taken as "stop": stands still, and waits for an instruction'
    assert entries(stack, "held") == [("held", told)]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "is empty"),
        ("  \n ", "is empty"),
        ("open\x07 the drawer", r"a control character \(U\+0007\) at position 5"),
        ("open \x1b[2J", r"U\+001B"),
        ("open \u202ethe drawer", r"U\+202E"),
        ("open \ud800", r"U\+D800"),
        ("x" * 10_000, f"10000 characters; at most {SENTENCE_CHARS}"),
        (7, "int, expected a sentence"),
        (None, "NoneType"),
    ],
)
def test_what_is_no_sentence_is_refused_in_one_line(text: Any, why: str) -> None:
    talk = Talk()
    with pytest.raises(ConfigError, match=why) as caught:
        talk.say(text, "anna")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 120
    assert str(caught.value).startswith("text: ") and not talk.take()


def test_a_sentence_is_taken_with_single_spaces_in_any_script() -> None:
    assert checked_sentence(" open\tthe \n drawer ", "say") == "open the drawer"
    assert (
        checked_sentence("öffne die Schublade, 打开抽屉", "say") == "öffne die Schublade, 打开抽屉"
    )


def test_who_says_it_is_one_short_line() -> None:
    talk = Talk()
    talk.say(NEAR, "anna\n\x1b[31m" + "x" * 200)
    (said,) = talk.take()
    assert said.who.startswith("anna") and len(said.who) <= 60 and said.who.isprintable()
    talk.say(NEAR, "")
    assert talk.take()[0].who == "somebody"


def test_after_the_run_it_is_said_that_it_has_ended() -> None:
    talk = Talk()
    talk.end()
    with pytest.raises(ConfigError, match="has ended"):
        talk.say(NEAR, "anna")


def test_many_who_talk_at_once_are_all_heard_in_order() -> None:
    talk, heard = Talk(), []

    def speak(name: str) -> None:
        for _ in range(200):
            talk.say(NEAR, name)

    threads = [threading.Thread(target=speak, args=(f"p{i}",)) for i in range(4)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        heard += talk.take()
    heard += talk.take()
    assert [said.number for said in heard] == list(range(1, 801))


def test_a_long_conversation_does_not_grow_for_ever() -> None:
    journal = Journal()
    for i in range(KEPT + 50):
        journal.add(i, "said", str(i))
    assert len(journal.since(0)) == KEPT and journal.since(0)[0].number == 51
    assert [entry.text for entry in journal.since(KEPT + 48)] == [str(KEPT + 48), str(KEPT + 49)]
    assert journal.since(KEPT + 50) == ()
    assert len(journal.rows(3)) == 3 and journal.rows(3)[-1]["line"].endswith(str(KEPT + 49))


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["tasks.instruction=open\x07"], "control character"),
        (["tasks.instructions=[open the drawer, '']"], r"instructions\[2\]: is empty"),
        (
            ["tasks.instruction=a", "tasks.instructions=[b]"],
            "instruction and instructions are both",
        ),
        (["tasks.instruction=a", "tasks.task=open_drawer"], "instruction and task are both given"),
    ],
)
def test_sentences_of_a_configuration_are_checked_alike(words: list[str], why: str) -> None:
    with pytest.raises(ConfigError, match=why) as caught:
        load(None, words)
    assert str(caught.value).startswith("tasks")


def test_one_sentence_or_a_list_of_them() -> None:
    assert load(None, ["tasks.instruction=say: open it"]).tasks.sentences == ("say: open it",)
    two = load(None, ["tasks.instructions=[open the drawer, close the drawer]"])
    assert two.tasks.sentences == ("open the drawer", "close the drawer")
    assert load(None).tasks.sentences == ()
