"The searcher: on houses made up here (its rules are text), on saved episodes, and in ALFWorld itself with all hidden state removed."
import json
import os
import random
from itertools import permutations
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exprag.trajectory import Task, Trajectory
from exprag.world import spread
from exprag.worlds.alfworld import EASY_TYPES, HARD_TYPES, alfworld_tasks
from exprag.worlds.alfworld_expert import (
    APPLIANCES, GOALS, ORDERS, SEARCH_VERSION, Goal, GoalError, Searcher, chance, cost, learn_priors,
    parse_goal, priors, read_contents, read_room, retrace, search_expert, walkthrough)

RECORD = Path(__file__).resolve().parents[1] / "nbs" / "data" / "alfworld_expert.json"
SENTENCES = {
    "look at mug under the desklamp.": Goal("look_at_obj_in_light", "mug", "desklamp"),
    "examine the mug with the floorlamp.": Goal("look_at_obj_in_light", "mug", "floorlamp"),
    "put a mug in shelf.": Goal("pick_and_place_simple", "mug", "shelf"),
    "put some mug on shelf.": Goal("pick_and_place_simple", "mug", "shelf"),
    "put a clean mug in shelf.": Goal("pick_clean_then_place_in_recep", "mug", "shelf"),
    "clean some mug and put it in shelf.": Goal("pick_clean_then_place_in_recep", "mug", "shelf"),
    "put a hot mug in shelf.": Goal("pick_heat_then_place_in_recep", "mug", "shelf"),
    "heat some mug and put it in shelf.": Goal("pick_heat_then_place_in_recep", "mug", "shelf"),
    "put a cool mug in shelf.": Goal("pick_cool_then_place_in_recep", "mug", "shelf"),
    "cool some mug and put it in shelf.": Goal("pick_cool_then_place_in_recep", "mug", "shelf"),
    "put two mug in shelf.": Goal("pick_two_obj_and_place", "mug", "shelf"),
    "find two mug and put them in shelf.": Goal("pick_two_obj_and_place", "mug", "shelf"),
}


class House:
    "A world of ALFWorld's sentences: places, some closed, some side by side; what lies in them is known to the house alone."
    world, world_version, settings = "alfworld", "a made-up house", {"grammar": "move"}

    def __init__(self, goal: str, contents: dict, closed=(), beside: dict | None = None):
        self.sentence, self.start, self.shut, self.beside = goal, contents, frozenset(closed), beside or {}

    def reset(self, task, cap=None):
        self.contents = {place: list(things) for place, things in self.start.items()}
        self.closed, self.at, self.hand, self.done, self.lit, self.steps, self.cap = set(self.shut), None, None, {}, False, 0, cap
        room = ", ".join(f"a {place}" for place in self.contents)
        return f"You are in the middle of a room. Looking quickly around you, you see {room}.\n\nYour task is to: {self.sentence}", self.info()

    def info(self): return {"goal": self.sentence, "score": float(self.won()), "success": self.won(), "steps": self.steps}
    def near(self, place): return place in self.contents and self.at is not None and self.beside.get(place, place) == self.beside.get(self.at, self.at)

    def look(self, place):
        if place in self.closed: return f"The {place} is closed."
        things = ", ".join(f"a {thing}" for thing in self.contents[place]) or "nothing"
        return f"The {place} is open. In it, you see {things}." if place in self.shut else f"On the {place}, you see {things}."

    def step(self, action):
        self.steps += 1
        observation = self.answer(action.split())
        return observation, 0.0, self.won(), self.cap is not None and self.steps >= self.cap, self.info()

    def answer(self, words):
        names = [" ".join(pair) for pair in zip(words, words[1:]) if pair[1].isdigit()]
        verb, first, last = words[0], names[0], names[-1]
        if verb == "go" and first in self.contents and not self.near(first):
            self.at = first
            return f"You arrive at {first}. {self.look(first)}"
        if verb == "examine" and self.near(first): return self.look(first)
        if verb == "open" and self.near(first) and first in self.closed:
            self.closed.discard(first)
            return f"You open the {first}. {self.look(first)}"
        if verb == "take" and self.near(last) and last not in self.closed and first in self.contents[last] and self.hand is None:
            self.contents[last].remove(first)
            self.hand = first
            return f"You pick up the {first} from the {last}."
        if verb == "move" and self.near(last) and last not in self.closed and first == self.hand:
            self.contents[last].append(first)
            self.hand = None
            return f"You move the {first} to the {last}."
        if verb in APPLIANCES and self.near(last) and last.startswith(APPLIANCES[verb]) and first == self.hand:
            self.done[first] = verb
            return f"You {verb} the {first} using the {last}."
        if verb == "use" and any(self.near(place) and first in things for place, things in self.contents.items()):
            self.lit = True
            return f"You turn on the {first}."
        return "Nothing happens."

    def won(self):
        goal = parse_goal(self.sentence)
        if goal.light: return self.lit and (self.hand or "").startswith(goal.thing) and any(
            self.near(place) and any(t.startswith(goal.place) for t in things) for place, things in self.contents.items())
        return any(sum(t.startswith(goal.thing) and self.done.get(t) == goal.prepare for t in things) >= goal.count
                   for place, things in self.contents.items() if place.startswith(goal.place))


@st.composite
def houses(draw):
    goal = draw(st.sampled_from(sorted(SENTENCES)))
    kinds = ("cabinet", "drawer", "shelf", "countertop", "bed", "sinkbasin", "microwave", "fridge")
    places = [f"{kind} {n + 1}" for kind in kinds for n in range(draw(st.integers(1, 4)) if kind not in APPLIANCES.values() else 1)]
    contents = {place: [] for place in places}
    parsed = parse_goal(goal)
    elsewhere = [p for p in places if not (parsed.type == "pick_and_place_simple" and p.startswith("shelf"))]
    for number in range(draw(st.integers(parsed.count, 3))): contents[draw(st.sampled_from(elsewhere))].append(f"mug {number + 1}")
    for number in range(draw(st.integers(0, 6))): contents[draw(st.sampled_from(places))].append(f"spoon {number + 1}")
    if parsed.light: contents[draw(st.sampled_from(places))].append(f"{parsed.place} 1")
    closed = draw(st.sets(st.sampled_from(places)))
    beside = {place: draw(st.sampled_from(places)) for place in draw(st.sets(st.sampled_from(places), max_size=3))}
    beside = {place: other for place, other in beside.items() if other not in beside}  # side by side, not in a chain
    return House(goal, draw(st.permutations(list(contents.items())).map(dict)), closed, beside)


TASK = Task("alfworld", "pick_and_place_simple", "made-up", "train")


# -- reading

@pytest.mark.parametrize("sentence", SENTENCES)
def test_every_sentence_is_read(sentence):
    assert parse_goal(sentence) == parse_goal("Your task is to: " + sentence) == parse_goal(sentence.rstrip(".")) == SENTENCES[sentence]


def test_the_sentences_cover_every_pattern():
    assert {goal.type for goal in SENTENCES.values()} == {kind for _, kind in GOALS} and len(GOALS) == 6


@pytest.mark.parametrize("sentence", ["", "Your task is to:", "Put a mug on the shelf, please.", "put three mug in shelf.", "put a warm mug in shelf.", "look at mug"])
def test_other_goals_are_refused_by_name(sentence):
    with pytest.raises(GoalError, match="cannot read the goal .*people"): parse_goal(sentence)


def test_a_room_without_places_is_refused():
    with pytest.raises(GoalError, match="no receptacles in 'You see a frog'"): Searcher("put a mug in shelf.", "You see a frog")


def test_reading_rooms_and_contents():
    assert read_room("-= Welcome to TextWorld, ALFRED! =-\n\nYou are in the middle of a room. Looking quickly around you, you see a armchair 1, a cabinet 12, and an ottoman 1.\n\n"
                     "Your task is to: put a mug in a shelf 3.") == ("armchair 1", "cabinet 12", "ottoman 1")
    assert read_contents("On the shelf 1, you see nothing.") == ("shelf 1", frozenset())
    assert read_contents("The safe 1 is open. In it, you see a keychain 3, a watch 1.") == ("safe 1", {"keychain 3", "watch 1"})
    assert read_contents("You arrive at safe 1. The safe 1 is closed.") == ("safe 1", None) and read_contents("Nothing happens.") is None
    assert read_contents("You are facing the shelf 1. Next to it, you see nothing.") is None


# -- the order

def test_priors_are_of_train_games_only_and_make_sense():
    table = priors()
    assert table["made_of"]["fold"] == "train" and table["made_of"]["games"] == 3356
    for rows in (table["closed"], *table["found"].values()):
        for kind, (some, of) in rows.items(): assert 0 <= some <= of and kind.isalpha()
    assert chance("mug", "coffeemachine") > chance("mug", "bathtubbasin") and chance("soapbar", "toilet") > chance("soapbar", "fridge")
    assert cost("fridge") > 1.5 > cost("countertop") >= 1
    assert 0 < chance("nosuchthing", "cabinet") < 1 and 0 < chance("mug", "nosuchplace") < 1 and cost("nosuchplace") == 1


@given(st.lists(st.tuples(st.floats(0.01, 1), st.floats(1, 2)), min_size=1, max_size=5))
def test_chance_over_cost_is_the_best_order(places):
    total = sum(p for p, _ in places)
    def steps(order):
        left, sum_ = 1.0, 0.0
        for p, c in order: left, sum_ = left - p / total, sum_ + c * left
        return sum_
    assert steps(sorted(places, key=lambda place: -place[0] / place[1])) <= min(map(steps, permutations(places))) + 1e-9


def test_learning_counts_only_what_can_be_used():
    facts = ["receptacleType S1 ShelfType", "receptacleType S2 ShelfType", "receptacleType F FridgeType", "openable F", "opened F", "openable S2",
             "objectType M MugType", "objectType M2 MugType", "objectType W WindowType", "objectType L DeskLampType", "pickupable M", "pickupable M2", "toggleable L",
             "inReceptacle M S1", "inReceptacle M2 S1", "inReceptacle W S2", "inReceptacle L F"]
    learnt = learn_priors(["(:init\n" + "\n".join(f" ({fact})" for fact in facts) + "\n)\n(:goal (and))"] * 2)
    assert learnt == {"found": {"desklamp": {"fridge": [2, 2], "shelf": [0, 4]}, "mug": {"fridge": [0, 2], "shelf": [2, 4]}},
                      "closed": {"fridge": [0, 2], "shelf": [2, 4]}}


# -- playing, in houses made up here

@settings(max_examples=150, deadline=None)
@given(house=houses(), order=st.sampled_from(sorted(ORDERS)))
def test_it_reaches_every_goal_that_can_be_reached(house, order):
    "And in a bounded number of steps: each place twice (go, open), once more where it is refused, and a few walks with things."
    made = search_expert(house, TASK, cap=300, order=order)
    assert made.success and made.provenance["ended"] == "goal" and len(made) <= 4 * len(house.contents) + 20
    assert retrace(made, order) == made.actions


@settings(max_examples=60, deadline=None)
@given(house=houses(), seed=st.integers(0, 99))
def test_what_is_hidden_does_not_matter_until_it_is_seen(house, seed):
    "Two houses that look alike are played alike for as long as they do."
    other = House(house.sentence, dict(house.start), house.shut, house.beside)
    things = [t for ts in house.start.values() for t in ts]
    other.start = {place: [] for place in house.start}
    dice = random.Random(seed)
    for thing in things: other.start[dice.choice(sorted(other.start))].append(thing)
    one, two = (search_expert(h, TASK, cap=300) for h in (house, other))
    for n in range(min(len(one), len(two))):
        if one.observations[:n + 1] != two.observations[:n + 1]: break
        assert one.actions[n] == two.actions[n]


def test_failures_are_kept_and_marked():
    empty = House("put two mug in shelf.", {"shelf 1": ["mug 1"], "drawer 1": []}, closed=["drawer 1"])
    made = search_expert(empty, TASK)
    assert not made.success and made.score == 0 and made.provenance["ended"] == "gave up" and made.actions == ("go to shelf 1", "go to drawer 1", "open drawer 1")
    hidden = House("put a mug in shelf.", {"shelf 1": [], **{f"drawer {n}": [] for n in range(1, 9)}, "drawer 9": ["mug 1"]})
    capped = search_expert(hidden, TASK, cap=5, order="alphabetical")
    assert (len(capped), capped.success, capped.provenance["ended"]) == (5, False, "cap")
    assert dict(capped.provenance) == {"actor": "search", "version": SEARCH_VERSION, "cap": 5, "order": "alphabetical", "ended": "cap"}
    assert Trajectory.from_dict(capped.to_dict()) == capped


def test_an_unknown_order_is_refused():
    with pytest.raises(ValueError, match="unknown order of search 'priors'; did you mean 'prior'"): search_expert(House("put a mug in shelf.", {"shelf 1": []}), TASK, order="priors")


def test_two_things_go_to_one_place():
    house = House("put two mug in shelf.", {"shelf 1": [], "shelf 2": ["mug 1"], "drawer 1": ["mug 2"]})
    made = search_expert(house, TASK)
    assert made.success and made.actions[-1] == "move mug 2 to shelf 2" and len([a for a in made.actions if a.startswith("take")]) == 1


# -- saved episodes

def saved() -> list[Trajectory]: return [Trajectory.from_dict(record) for record in json.loads(RECORD.read_text())["episodes"]]


def test_saved_searches_follow_from_their_text_and_walkthroughs_do_not():
    searches = [t for t in saved() if t.provenance["actor"] == "search"]
    knowing = [t for t in saved() if t.provenance["actor"] == "walkthrough"]
    assert searches and knowing and all(t.provenance["privileged"] for t in knowing)
    assert all(retrace(t) == t.actions for t in searches) and sum(retrace(t) != t.actions for t in knowing) >= 4


def test_the_record_reaches_what_was_asked_for():
    games = json.loads(RECORD.read_text())["games"]["search"]
    for fold, count in (("test", 134), ("seen", 140), ("train", 300)):
        won = [row[-1] for row in games[fold] if row[-1] is not None and row[-1] <= 100]
        assert len(games[fold]) == count and len(won) >= 0.98 * count


# -- ALFWorld itself

class Blind:
    "An environment with nothing but its text: no admissible commands, no facts, no path of the game, no engine behind it."

    def __init__(self, env):
        self.world, self.world_version, self.settings = env.world, env.world_version, env.settings
        self.reset = lambda task, cap=None: self.strip(*env.reset(task, cap=cap))
        self.step = lambda action: self.strip(*env.step(action))

    @staticmethod
    def strip(*answer): return *answer[:-1], {key: answer[-1][key] for key in ("goal", "score", "success", "steps")}


@pytest.fixture(scope="module")
def env():
    if not os.environ.get("ALFWORLD_DATA"): pytest.skip("needs ALFWORLD_DATA, the folder of the games")
    pytest.importorskip("textworld.envs.pddl", reason="needs exprag[alfworld]")
    from exprag.worlds.alfworld import ALFWorldEnv
    with ALFWorldEnv() as made: yield made


def some(fold: str, each: int) -> list[Task]:
    "A few games of each type, evenly spread."
    return [task for kind in EASY_TYPES + HARD_TYPES for task in spread(alfworld_tasks(fold, [kind]), each)]


@pytest.fixture(scope="module")
def blind(env) -> dict[Task, Trajectory]:
    "One unseen game of each type, played without sight of anything but text."
    return {task: search_expert(Blind(env), task) for task in some("test", 1)}


def test_alfworld_is_won_with_every_hidden_channel_removed(blind):
    for task, made in blind.items():
        assert made.success and made.score == 1 and len(made) <= 50 and retrace(made) == made.actions, task


def test_nothing_changes_when_the_rest_is_there(env, blind):
    task = list(blind)[-1]
    assert search_expert(env, task) == blind[task]


def test_the_searcher_is_handed_strings_and_nothing_else(env, monkeypatch):
    handed = []
    def watch(name):
        method = getattr(Searcher, name)
        monkeypatch.setattr(Searcher, name, lambda self, *a, **k: (handed.extend([*a, *k.values()]), method(self, *a, **k))[1])
    watch("__init__"), watch("see"), watch("act")
    search_expert(env, some("seen", 1)[0])
    assert handed and all(isinstance(value, str) or value in ORDERS.values() for value in handed)


def test_walkthroughs_win_and_are_marked_as_privileged(env):
    for task in some("test", 1)[::3]:
        made = walkthrough(env, task)
        assert made.success and made.provenance["privileged"] and made.provenance["actor"] == "walkthrough" and made.world_version == made.provenance["version"]


def test_a_cap_that_is_too_small_is_a_kept_failure(env):
    made = search_expert(env, some("test", 1)[-1], cap=3)
    assert (len(made), made.success, made.score, made.provenance["ended"]) == (3, False, 0, "cap")


def test_the_old_dialect_is_used_in_an_environment_of_it(env, blind):
    from exprag.worlds.alfworld import ALFWorldEnv
    task = some("test", 1)[1]
    with ALFWorldEnv(grammar="put") as old: made = search_expert(old, task)
    new = blind[task]
    assert made.success and made.actions[-1].startswith("put ") and made.actions[:-1] == new.actions[:-1] and retrace(made) == made.actions


@pytest.mark.slow
@pytest.mark.parametrize("fold", ["test", "seen", "train"])
def test_at_least_98_percent_are_won_within_100_steps(env, fold):
    tasks = alfworld_tasks(fold) if fold != "train" else spread(alfworld_tasks(fold), 300)
    rows = json.loads(RECORD.read_text())["games"]["search"][fold]
    made = [search_expert(Blind(env), task) for task in tasks]
    assert sum(t.success for t in made) >= 0.98 * len(tasks)
    assert [len(t) if t.success else None for t in made] == [steps for _, steps in rows]


@pytest.mark.slow
def test_the_priors_are_those_of_the_train_fold(env):
    from exprag.worlds.alfworld import read_game
    learnt = learn_priors(read_game(task)["pddl_problem"] for task in alfworld_tasks("train"))
    assert learnt["found"] == priors()["found"] and learnt["closed"] == priors()["closed"]
