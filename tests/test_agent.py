"Rollouts: episodes in lockstep, memories that are asked once or again, simulators that die."
import json

import pytest
from chat_models import make_model, make_tokenizer
from echo import (
    CAPS, EVERY_STEP, FORMAT, TASKS, Changing, Echo, Recall, Scripted, play, policy_of)
from encoders import WordEncoder

from exprag.agent import Limits, PolicyError, Running, rollout
from exprag.models.local import HFPolicy
from exprag.prompt import PromptFormat
from exprag.query import Retriever
from exprag.select import Every, Memory, Once, successes_only, top_k
from exprag.store import Store
from exprag.trajectory import Step, Task, Trajectory, TrajectoryError
from exprag.views import register_view, render
from exprag.worlds.scienceworld import ScienceWorldEnv, scienceworld_tasks


@pytest.fixture(autouse=True)
def fresh_echo(): Echo.made = Echo.closed = 0; Echo.deaths = ()


def ids(run): return {task: episode.id for task, episode in run.items()}
def asks(run): return {task: episode.provenance["asks"] for task, episode in run.items()}


def test_provenance_says_what_an_episode_took():
    done = play(policy_of(), TASKS[:2], Recall())[TASKS[0]]
    p = done.provenance
    assert p["actor"] == "tiny-qwen" and p["memory"] == Recall().describe() and len(p["retrieved"]) == 1
    assert p["policy"] == policy_of().describe() and p["stop"] == "cap" and p["restarts"] == 0
    assert p["seconds"] >= 0 and p["tokens"]["generated"] > 0
    assert done.score == len(done) == CAPS["t0"] and done.success is False
    assert done.steps[0].reward == 1.0
    json.dumps(done.to_dict())


def test_simulators_are_shared_and_closed():
    play(policy_of(batch_size=3), TASKS[:7])
    assert Echo.made == Echo.closed == 3
    running = rollout(policy_of(batch_size=3), Echo, TASKS[:7], limits=Limits(CAPS))
    next(running)
    running.close()
    assert Echo.made == Echo.closed == 6


def test_a_dead_simulator_is_replaced_and_its_episode_run_again():
    whole = play(policy_of(batch_size=3), TASKS[:6])
    Echo.deaths = ((str(TASKS[1]), 2), (str(TASKS[2]), 3))  # the task and step at which it dies
    again = play(policy_of(batch_size=3), TASKS[:6])
    assert ids(whole) == ids(again) and not Echo.deaths
    assert [again[t].provenance["restarts"] for t in TASKS[:4]] == [0, 1, 1, 0]
    Echo.deaths = ((str(TASKS[1]), 1),)
    with pytest.raises(PolicyError, match="the simulator died 1 times"):
        play(policy_of(), TASKS[:3], restarts=0)
    assert Echo.made == Echo.closed


def test_patience():
    class Deaf(Echo):
        def step(self, action): return "Nothing happens.", *super().step(action)[1:]
    def ends(**limits):
        done, = rollout(Scripted("wait"), Deaf, TASKS[2:3], limits=Limits({"t2": 5}, **limits))
        return len(done), done.provenance["stop"]
    assert ends(patience=3) == (3, "patience") and ends() == (5, "cap")


def test_memory_and_prompt_show_the_same_view():
    class Chatty(Recall): view = "chat"
    with pytest.raises(PolicyError, match="view 'chat' and the prompt writes 'actions'"):
        play(policy_of(), TASKS[:1], Chatty())
    assert play(policy_of(format=PromptFormat(FORMAT.instruction, (), "chat")), TASKS[:1], Chatty())


def test_a_scienceworld_simulator_that_is_killed():
    task = scienceworld_tasks("test", ["find-living-thing"])[0]
    worlds = []
    class Mortal(ScienceWorldEnv):
        def __init__(self): super().__init__(); worlds.append(self)
        def step(self, action):
            if len(worlds) == 1 and self.steps == 1: self._process.kill()
            return super().step(action)
    actions = "look around", "inventory", "open door to hallway"
    done, = rollout(Scripted(*actions), Mortal, [task], limits=Limits({task.type: 3}))
    assert done.provenance["restarts"] == 1 and len(worlds) == 2
    assert done.actions == actions and done.provenance["stop"] == "cap"
    assert done.world_version and done.settings["simplification"] == "easy"


def test_scienceworld_with_a_model():
    tokenizer = make_tokenizer("qwen")
    model = make_model("qwen", len(tokenizer), max_position_embeddings=8192)
    tasks, limits = scienceworld_tasks("test", ["find-plant"])[:2], Limits({"find-plant": 3}, 1)
    policy = HFPolicy(model, tokenizer, max_new_tokens=6)
    done = list(rollout(policy, ScienceWorldEnv, tasks, limits=limits))  # one simulator plays both
    assert [t.task for t in done] == list(tasks)
    assert all(len(t) == 3 and t.goal.startswith("Your task") and render(t) for t in done)


# ---- a memory that is asked again ----

def test_asking_again_gives_the_same_cached_uncached_alone_and_in_a_batch():
    tasks, ways = TASKS[:24], {"batch": {}, "three": {"batch_size": 3}, "alone": {"batch_size": 1},
                               "uncached": {"batch_size": 1, "cache": False}}
    runs = {name: play(policy_of(**way), tasks, Changing(EVERY_STEP)) for name, way in ways.items()}
    for run in runs.values():
        assert ids(run) == ids(runs["uncached"]) and asks(run) == asks(runs["uncached"])
    for t, x in runs["batch"].items():
        asked, account = CAPS[t.type], x.provenance["asks"]
        assert account["asked"] == asked and account["rebuilt"] == (asked > 2)
        assert [step for step, _ in account["shown"]] == [0, 2][:1 + (asked > 2)]
        assert len(x.provenance["retrieved"]) == 1 + (asked > 2)
        assert x.provenance["memory"]["asked"] == {"when": "every", "steps": 1}
    static = play(policy_of(), tasks, Changing())
    changed = [static[t].actions != runs["batch"][t].actions for t in tasks if t.type == "t2"]
    assert any(changed), "what is read decides what is done"
    assert all(static[t].actions[:2] == runs["batch"][t].actions[:2] for t in tasks)
    json.dumps(runs["batch"][tasks[2]].to_dict())


def test_an_equal_answer_keeps_the_cache():
    class Same(Changing): period = 99
    static, asked = (play(policy_of(), TASKS[:9], Same(when)) for when in (Once(), EVERY_STEP))
    assert ids(asked) == ids(static)
    assert all(asked[t].provenance["tokens"] == static[t].provenance["tokens"] for t in static)
    assert all(a["rebuilt"] == 0 and a["asked"] == CAPS[t.type] for t, a in asks(asked).items())
    changing, long = play(policy_of(), TASKS[2:9:3], Changing(EVERY_STEP)), TASKS[2]
    computed = [run[long].provenance["tokens"]["computed"] for run in (changing, asked)]
    assert computed[0] > computed[1], "another memory block is another beginning"


def test_static_retrieval_asks_once():
    Changing.asked = 0
    static = play(policy_of(), TASKS[:9], Changing())
    assert Changing.asked == 9
    assert set(static[TASKS[0]].provenance) == {
        "actor", "policy", "memory", "retrieved", "stop", "tokens", "seconds", "restarts"}
    class Silent(Recall): when = None  # a memory without a rule is asked once as well
    Silent.describe = lambda self: {"kind": "silent"}
    assert ids(play(policy_of(), TASKS[:9], Silent())) == ids(play(policy_of(), TASKS[:9], Recall()))


def test_a_restarted_episode_asks_anew():
    memory = Changing(EVERY_STEP)
    whole = play(policy_of(batch_size=3), TASKS[:6], memory)
    Echo.deaths = ((str(TASKS[2]), 3), (str(TASKS[5]), 4))
    again = play(policy_of(batch_size=3), TASKS[:6], memory)
    assert ids(whole) == ids(again) and asks(whole) == asks(again)
    assert again[TASKS[2]].provenance["restarts"] == 1


def memory_of(folder, *episodes, view="actions", when=Once()):
    "A real memory of some episodes, whatever their task."
    store = Store(folder / "store.db")
    store.add_many(episodes)
    return Memory(Retriever(store, WordEncoder()), (successes_only(), top_k(1)), view=view, when=when)


def test_the_rule_is_part_of_what_a_memory_is(tmp_path):
    often, seldom = (memory_of(tmp_path, when=Every(n)) for n in (4, 5))
    assert often.fingerprint != seldom.fingerprint
    assert seldom.describe()["asked"] == {"when": "every", "steps": 5}


# ---- the dialects of a world ----

class House(Echo):
    "A world that says it is ALFWorld's newer or older release."
    world, grammar = "alfworld", "move"
    @property
    def settings(self): return {"grammar": self.grammar}


class OldHouse(House): grammar = "put"


HOUSE = Task("alfworld", "pick_and_place_simple", "here", "test")
PUT = Step("put mug 1 in/on desk 1", "You put the mug 1 in/on the desk 1.")
OLD = Trajectory(Task("alfworld", "pick_and_place_simple", "g", "train"), "put a mug in a desk",
                 "You are in the middle of a room.",
                 (Step("go to desk 1", "On the desk 1, you see nothing."), PUT),
                 settings={"grammar": "put"}).finish(1.0, True)
DIALECTS = [(House, "> move mug 1 to desk 1 |"), (OldHouse, "> put mug 1 in/on desk 1 |")]


@pytest.mark.parametrize("world, line", DIALECTS)
def test_experience_is_shown_in_the_dialect_of_the_environment(tmp_path, world, line):
    policy, limits = Scripted("look"), Limits({HOUSE.type: 1})
    done, = rollout(policy, world, [HOUSE], memory_of(tmp_path, OLD), limits)
    assert line in policy.shown[0]
    assert list(done.provenance["retrieved"]) == [OLD.id], "the id that it has in the store"


@pytest.mark.parametrize("world", [House, OldHouse])
def test_the_text_that_the_agent_reads_tells_memories_apart(tmp_path, world):
    policy, episode = Scripted("look"), Running(0, HOUSE, world())
    policy.format = PromptFormat()
    episode.begin(), episode.remember(memory_of(tmp_path, OLD), policy)
    read = PromptFormat().messages(episode.trajectory, episode.selection.experiences)
    assert episode.refresher.names == read[0]["content"]


def test_experience_that_cannot_be_translated_is_refused(tmp_path):
    def go(*episodes, view="actions", folder):
        (tmp_path / folder).mkdir()
        policy, memory = Scripted("look"), memory_of(tmp_path / folder, *episodes, view=view)
        policy.format = PromptFormat(FORMAT.instruction, (), view)
        return list(rollout(policy, House, [HOUSE], memory, Limits({HOUSE.type: 1})))
    steps = PUT, Step("move mug 1 to desk 1", "ok")
    mixed = Trajectory(OLD.task, "put a mug in a desk", "A room.", steps).finish(1.0, True)
    with pytest.raises(TrajectoryError, match="in both dialects .* state it"): go(mixed, folder="mixed")
    def rules(experience): return "always put things in/on desks"
    rules.sources = lambda experience: (experience.id,)
    register_view("my rules", rules)
    with pytest.raises(ValueError, match="write it from translated episodes"):
        go(OLD, view="my rules", folder="rules")
