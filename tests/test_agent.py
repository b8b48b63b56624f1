"Policies and rollouts: the same actions however they are computed, and episodes that survive their simulator."
import json
import random
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
import torch
from chat_models import CORPUS, FAMILIES, make_model, make_tokenizer

from exprag.agent import Action, Dynamic, Episode, HFPolicy, OpenAIPolicy, PolicyError, PromptFormat, just_refused, load_model, load_tokenizer, rollout
from exprag.decoding import Draft
from exprag.environment import ScienceWorldEnv, SimulatorError, action_templates, scienceworld_tasks
from exprag.situations import Every, Once
from exprag.store import VIEWS
from exprag.trajectory import Step, Task, Trajectory, TrajectoryError

WORDS = " ".join(CORPUS).split()
FORMAT = PromptFormat(instruction="You act in a text world. Answer each observation with one action.", templates=())
TASKS = [Task("echo", f"t{i % 3}", str(i), "test") for i in range(56)]
CAPS = {"t0": 1, "t1": 2, "t2": 4}


class Echo:
    "A world that answers with words drawn from the task, the step and the action, so that a changed action changes all that follows."
    world, world_version, settings = "echo", "1", {}
    made, closed, deaths, shut = 0, 0, (), False

    def __init__(self): type(self).made += 1

    def reset(self, task, cap=None):
        self.task, self.steps = task, 0
        self.goal = self.words(task, 12)
        return self.words(f"{task} first", 20), self.info()

    def step(self, action):
        self.steps += 1
        if (str(self.task), self.steps) in self.deaths:
            type(self).deaths = tuple(d for d in self.deaths if d != (str(self.task), self.steps))
            raise SimulatorError("the simulator died; reset(task) starts a new one")
        return self.words(f"{self.task} {self.steps} {action}", len(action) % 30 + 1), 1.0, False, False, self.info()

    def words(self, seed, n): return " ".join(random.Random(str(seed)).choices(WORDS, k=n))
    def info(self): return {"goal": self.goal, "score": float(self.steps), "success": False, "steps": self.steps, "task": self.task}
    def close(self):
        type(self).closed += not self.shut
        self.shut = True


@pytest.fixture(autouse=True)
def fresh_echo(): Echo.made = Echo.closed = 0; Echo.deaths = ()


MODELS = {}


def policy_of(family="qwen", format=FORMAT, **settings):
    if family not in MODELS:
        tokenizer = make_tokenizer(family)
        MODELS[family] = make_model(family, len(tokenizer)), tokenizer
    return HFPolicy(*MODELS[family], format, **({"max_new_tokens": 6} | settings))


class Recall:
    "A memory that recalls one finished episode of another task."
    class Selection:
        def __init__(self, *experiences): self.experiences = experiences
    def recall(self, trajectory):
        return self.Selection(Trajectory(Task("echo", "t9", "0", "train"), trajectory.goal[::-1], "look", (Step("wait", "ok"),)).finish(100.0, True))
    def describe(self): return {"kind": "test"}


def play(policy, tasks, memory=None, **settings):
    done = list(rollout(policy, Echo, tasks, memory, **({"caps": CAPS} | settings)))
    assert sorted(t.task for t in done) == sorted(tasks)
    return {t.task: t for t in done}


def test_same_actions_cached_uncached_alone_and_in_a_batch():
    runs = {name: play(policy_of(**settings), TASKS, Recall()) for name, settings in
            {"batch": {}, "alone": {"batch_size": 1}, "uncached": {"batch_size": 1, "cache": False}}.items()}
    actions = {name: [run[task].actions for task in TASKS] for name, run in runs.items()}
    assert len(TASKS) >= 50 and actions["batch"] == actions["alone"] == actions["uncached"]
    assert len({a for episode in actions["batch"] for a in episode}) > 50, "the actions are not all the same"
    cost = {name: {k: sum(t.provenance["tokens"][k] for t in run.values()) / len(TASKS) for k in ("prompt", "computed", "generated")} for name, run in runs.items()}
    assert cost["batch"] == cost["alone"] and cost["batch"]["prompt"] == cost["uncached"]["prompt"]
    assert cost["batch"]["computed"] < 0.7 * cost["uncached"]["computed"]
    assert cost["uncached"]["computed"] >= cost["uncached"]["prompt"]


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_family_in_a_batch_of_three(family):
    a, b = play(policy_of(family, batch_size=3), TASKS[:7]), play(policy_of(family, batch_size=1, cache=False), TASKS[:7])
    assert {t: x.actions for t, x in a.items()} == {t: x.actions for t, x in b.items()}


def test_close_calls_are_settled_alone():
    policy = policy_of(close_call=1.0)  # every choice is a close call: all answers are the model's own, from nothing
    assert {t: x.actions for t, x in play(policy, TASKS[:6]).items()} == {t: x.actions for t, x in play(policy_of(), TASKS[:6]).items()}
    assert policy.writer.close_calls > 0


def test_constrained_actions_fit_the_templates():
    templates = ("open OBJ", "move OBJ to OBJ", "look around")
    format = PromptFormat(instruction="Act.", templates=templates)
    runs = [play(policy_of(format=format, constrain="templates", max_new_tokens=16, batch_size=n), TASKS[:8]) for n in (4, 1)]
    assert {t: x.actions for t, x in runs[0].items()} == {t: x.actions for t, x in runs[1].items()}
    actions = [(a, t.provenance["tokens"]) for t in runs[0].values() for a in t.actions]
    assert all(a.startswith(("open ", "move ", "look around")) for a, _ in actions) and any(a == "look around" for a, _ in actions)
    with pytest.raises(PolicyError, match="there are None .* and 'templates'"): policy_of(constrain="grammar")


def test_answers_are_one_line_and_counted():
    policy = policy_of()
    action, = policy.act([Trajectory(TASKS[0], "open door", "You see a door.")])
    assert isinstance(action, Action) and "\n" not in action.text and action.text == action.text.strip()
    assert action.stop in ("end", "newline", "length") and 1 <= action.tokens_out <= 6
    assert action.tokens_in <= action.tokens_computed <= action.tokens_in + action.tokens_out


def test_more_episodes_than_rows_take_turns():
    policy = policy_of(batch_size=2)
    episodes = [Trajectory(t, f"goal {t.variation}", "look") for t in TASKS[:5]]
    first = policy.act(episodes)
    alone = [policy_of(batch_size=1).act([e])[0].text for e in episodes]
    assert [a.text for a in first] == alone == [a.text for a in policy.act(episodes)]
    twins = policy.act([episodes[0]] * 2)
    assert twins[0].text == twins[1].text == alone[0]
    with pytest.raises(PolicyError, match="one of each"): policy.act(episodes, keys=[1, 2, 3, 4, 4])


def test_an_episode_too_long_ends_and_the_others_go_on():
    policy = policy_of(max_context=150)
    long, short = Task("echo", "t2", "0", "test"), Task("echo", "t0", "0", "test")
    class Wordy(Echo):
        def step(self, action):
            observation, *rest = super().step(action)
            return observation + (" door" * 300 if self.task == long else ""), *rest
    done = {t.task: t for t in rollout(policy, Wordy, [long, short], caps={"t2": 5, "t0": 1})}
    assert done[long].provenance["stop"] == "context" and len(done[long]) == 1 and done[long].success is False
    assert done[short].provenance["stop"] == "cap" and len(done[short]) == 1


def test_provenance_says_what_it_took():
    done = play(policy_of(), TASKS[:2], Recall())[TASKS[0]]
    p = done.provenance
    assert p["actor"] == "tiny-qwen" and p["memory"] == {"kind": "test"} and len(p["retrieved"]) == 1 and p["stop"] == "cap"
    assert p["policy"] == policy_of().describe() and p["seconds"] >= 0 and p["tokens"]["generated"] > 0 and p["restarts"] == 0
    assert done.score == len(done) == CAPS["t0"] and done.success is False and done.steps[0].reward == 1.0
    json.dumps(done.to_dict())



def test_an_action_says_something():
    policy = policy_of("qwen", batch_size=1)
    writer, end, newline = policy.writer, policy.encoder.tokenizer.eos_token_id, policy.encoder.tokenizer("\n", add_special_tokens=False)["input_ids"][0]
    wanted = policy.encoder.tokenizer("look", add_special_tokens=False)["input_ids"][0]
    logits = torch.zeros(policy.model.config.vocab_size)
    logits[[end, newline, wanted]] = torch.tensor([9.0, 8.0, 7.0])
    assert writer.best(Draft([1], logits, 1, None), logits)[0] == wanted
    assert writer.best(Draft([1], logits, 1, None, [wanted], "look"), logits) == (end, 1.0)


def test_an_action_does_not_end_as_one_to_be_avoided():
    policy = policy_of("qwen", batch_size=1)
    tokenizer, writer, encode = policy.encoder.tokenizer, policy.writer, lambda text: policy.encoder.tokenizer(text, add_special_tokens=False)["input_ids"]
    (newline, *_), (look, *_), (more, *_) = encode("\n"), encode("look"), encode(" door")
    logits = torch.zeros(policy.model.config.vocab_size)
    logits[[tokenizer.eos_token_id, newline, more]] = torch.tensor([9.0, 8.0, 7.0])
    assert writer.best(Draft([1], logits, 1, None, [look], "look", avoid=frozenset({"look"})), logits)[0] == more
    assert writer.best(Draft([1], logits, 1, None, [look], "look", avoid=frozenset({"look door"})), logits)[0] == tokenizer.eos_token_id


REFUSAL, CHOICES = "No known action matches that input.", "Ambiguous request: Please enter the number for the action you intended (or blank to cancel):\n0:\ta\n1:\tb"


def test_who_heeds_the_world_answers_its_questions_and_says_nothing_refused_again():
    heeding, plain = policy_of(heeds=True, batch_size=2), policy_of(batch_size=1)
    begun = Trajectory(Task("scienceworld", "boil", "0", "train"), "open door", "You see a door.")
    assert heeding.act([begun.with_step(Step("open door", CHOICES))])[0].text in ("0", "1") and heeding.describe()["heeds"] and "heeds" not in plain.describe()
    said, now = [], begun
    for _ in range(6):
        said.append(heeding.act([now], keys=[0])[0].text)
        now = now.with_step(Step(said[-1], REFUSAL))
    assert len(set(said)) == 6 and said[0] == plain.act([begun])[0].text, "nothing is said twice, and the first is the model's own"
    assert just_refused(now) == set(said) and just_refused(now.with_step(Step("wait", "You wait."))) == just_refused(Trajectory(TASKS[0], "", "", (Step("a", REFUSAL),))) == frozenset()


def test_weights_tell_policies_apart():
    tokenizer = make_tokenizer("qwen")
    one, two = (HFPolicy(make_model("qwen", len(tokenizer), seed=s), tokenizer, FORMAT).describe()["weights"] for s in (0, 1))
    assert one != two == HFPolicy(make_model("qwen", len(tokenizer), seed=1), tokenizer, FORMAT).describe()["weights"]


def test_worlds_are_shared_out_and_closed():
    play(policy_of(batch_size=3), TASKS[:7])
    assert Echo.made == Echo.closed == 3
    running = rollout(policy_of(batch_size=3), Echo, TASKS[:7], caps=CAPS)
    next(running)
    running.close()
    assert Echo.made == Echo.closed == 6


def test_a_dead_world_is_replaced_and_its_episode_run_again():
    whole = play(policy_of(batch_size=3), TASKS[:6])
    Echo.deaths = ((str(TASKS[1]), 2), (str(TASKS[2]), 3))  # the task and step at which the simulator dies
    again = play(policy_of(batch_size=3), TASKS[:6])
    assert {t: x.id for t, x in whole.items()} == {t: x.id for t, x in again.items()} and not Echo.deaths
    assert [again[t].provenance["restarts"] for t in TASKS[:4]] == [0, 1, 1, 0]
    Echo.deaths = ((str(TASKS[1]), 1),)
    with pytest.raises(PolicyError, match="the simulator died 1 times"): play(policy_of(), TASKS[:3], restarts=0)
    assert Echo.made == Echo.closed


def test_patience():
    class Deaf(Echo):
        def step(self, action): return "Nothing happens.", *super().step(action)[1:]
    class Stubborn:
        name, batch_size = "stubborn", 2
        def reset(self): pass
        def describe(self): return {}
        def act(self, trajectories, experiences, keys): return [Action("wait", 1, 1, 1, "end")] * len(trajectories)
    done, = rollout(Stubborn(), Deaf, TASKS[2:3], caps={"t2": 5}, patience=3)
    assert len(done) == 3 and done.provenance["stop"] == "patience"
    done, = rollout(Stubborn(), Deaf, TASKS[2:3], caps={"t2": 5})
    assert len(done) == 5 and done.provenance["stop"] == "cap"


def test_models_from_disk(tmp_path, monkeypatch):
    from peft import LoraConfig, get_peft_model
    tokenizer = make_tokenizer("qwen")
    model = make_model("qwen", len(tokenizer))
    model.save_pretrained(tmp_path / "base"), tokenizer.save_pretrained(tmp_path / "base")
    lora = get_peft_model(model, LoraConfig(r=2, init_lora_weights=False, target_modules=["q_proj", "v_proj"]))
    lora.save_pretrained(tmp_path / "tuned")
    plain = HFPolicy.from_pretrained(str(tmp_path / "base"), format=FORMAT, device="cpu")
    tuned = HFPolicy.from_pretrained(str(tmp_path / "base"), tmp_path / "tuned", format=FORMAT, device="cpu", batch_size=2)
    assert plain.name == "base" and tuned.name == "base+tuned" and plain.weights != tuned.weights and tuned.batch_size == 2
    assert play(plain, TASKS[:3])
    (tmp_path / "tuned" / "adapter_model.safetensors").rename(tmp_path / "tuned" / "adapter_model.bin")
    with pytest.raises(PolicyError, match="no adapter_model.safetensors"): load_model(str(tmp_path / "base"), tmp_path / "tuned")
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **_: tmp_path / "tuned")
    with pytest.raises(PolicyError, match="some/adapter holds no adapter_model.safetensors"): load_model(str(tmp_path / "base"), "some/adapter")
    def nowhere(*_, **__): raise FileNotFoundError("404")
    monkeypatch.setattr("huggingface_hub.snapshot_download", nowhere)
    with pytest.raises(PolicyError, match="'runs/addapter' is no folder here, and was not found on the hub: 404"):
        load_model(str(tmp_path / "base"), "runs/addapter")
    small = make_model("qwen", 10)
    with pytest.raises(PolicyError, match="load both from the same place"): HFPolicy(small, tokenizer)


def test_a_tokenizer_is_the_file_in_its_folder(tmp_path):
    from transformers import AutoTokenizer
    tokenizer = make_tokenizer("mistral")  # not byte-level, but kept beside a model of the Qwen2 architecture
    make_model("qwen", len(tokenizer)).save_pretrained(tmp_path), tokenizer.save_pretrained(tmp_path)
    text = "open door to kitchen"
    assert AutoTokenizer.from_pretrained(tmp_path)(text)["input_ids"] != tokenizer(text)["input_ids"], "the trap is real"
    assert load_tokenizer(str(tmp_path))(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert play(HFPolicy.from_pretrained(str(tmp_path), format=FORMAT, device="cpu", max_new_tokens=4), TASKS[:2])


def test_memory_and_prompt_show_the_same_view():
    class Chatty(Recall): view = "chat"
    with pytest.raises(PolicyError, match="counts the view 'chat' and the prompt writes 'actions'"): play(policy_of(), TASKS[:1], Chatty())
    assert play(policy_of(format=PromptFormat(FORMAT.instruction, (), "chat")), TASKS[:1], Chatty())


def test_a_server():
    asked = []
    class Server(BaseHTTPRequestHandler):
        def do_POST(self):
            asked.append((self.path, self.headers.get("Authorization"), json.loads(self.rfile.read(int(self.headers["Content-Length"])))))
            reply = {"choices": [{"message": {"content": " open door\nand more"}, "finish_reason": "stop"}], "usage": {"prompt_tokens": 9, "completion_tokens": 3}}
            self.send_response(200), self.end_headers(), self.wfile.write(json.dumps(reply).encode())
        def log_message(self, *_): pass
    server = HTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    policy = OpenAIPolicy("some-model", f"http://127.0.0.1:{server.server_port}/v1/", FORMAT, key_variable="NOBODY_SETS_THIS")
    done = play(policy, TASKS[:2], Recall())
    server.shutdown(), server.server_close()
    assert done[TASKS[0]].actions == ("open door",) * CAPS["t0"]
    path, key, body = asked[0]
    assert path == "/v1/chat/completions" and key is None and body["temperature"] == 0 and body["messages"][0]["role"] == "system"
    with pytest.raises(PolicyError, match="is the server up"): policy.act([Trajectory(TASKS[0], "g", "o")])


GOOD = (200, {}, json.dumps({"choices": [{"message": {"content": "wait"}, "finish_reason": "stop"}]}))
START = Trajectory(TASKS[0], "g", "o")


@contextmanager
def server_that(answers):
    "A policy whose server gives these answers: (status, headers, body) one after the other, or what a function makes of the request."
    class Server(BaseHTTPRequestHandler):
        def do_POST(self):
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            status, headers, body = answers(asked) if callable(answers) else answers.pop(0)
            self.send_response(status)
            for name, value in headers.items(): self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body.encode())
        def log_message(self, *_): pass
    server = HTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try: yield OpenAIPolicy("some-model", f"http://127.0.0.1:{server.server_port}/v1", FORMAT, key_variable="NOBODY_SETS_THIS", timeout=10)
    finally: server.shutdown(), server.server_close()


@pytest.mark.parametrize("status, said", [
    (400, "This model's maximum context length is 2048 tokens. However, you requested 2100 tokens."),
    (400, '{"error": {"code": "context_length_exceeded"}}'),
    (400, '{"error": {"type": "exceed_context_size_error"}}'),
    (400, "The decoder prompt (length 2100) is longer than the maximum model length of 2048."),
    (413, ""),
])
def test_a_prompt_too_long_for_the_server_ends_its_own_episode_alone(status, said):
    def answers(asked): return (status, {}, said) if len(asked["messages"]) > 4 else GOOD
    with server_that(answers) as policy: done = play(policy, TASKS[:3])
    assert [(len(done[t]), done[t].provenance["stop"]) for t in TASKS[:3]] == [(1, "cap"), (2, "cap"), (2, "context")]


def test_a_busy_server_is_asked_again_and_later_each_time(monkeypatch):
    waited, busy = [], (429, {}, "slow down")
    monkeypatch.setattr("exprag.agent.time.sleep", waited.append)
    with server_that([(503, {}, "loading"), busy, busy, GOOD]) as policy: assert policy.ask(START).text == "wait"
    assert len(waited) == 3 and waited == sorted(set(waited))
    waited.clear()
    with server_that([(429, {"Retry-After": wish}, "") for wish in ("7", "9999", "Fri, 31 Dec 1999 23:59:59 GMT")] + [GOOD]) as policy: policy.ask(START)
    assert waited == [7, 60, 25]
    with server_that([(503, {}, "the model is\nstill loading")] * 9) as policy:
        with pytest.raises(PolicyError, match="refused echo/t0/0@test with 503 .*: the model is still loading"): policy.ask(START)


def test_what_a_server_says_stands_in_the_error(monkeypatch):
    def never(seconds): raise AssertionError("a refusal is no reason to wait")
    monkeypatch.setattr("exprag.agent.time.sleep", never)
    for status, body, told in [(404, '{"message": "The model `some-model` does not exist."}', "refused .* with 404 .*does not exist.*called 'some-model'"),
                               (401, "bad key", "with 401 .*bad key.*NOBODY_SETS_THIS hold the key"), (400, "", "with 400 Bad Request: nothing;"),
                               (200, "<html>a web page</html>", "no chat completion .*<html>a web page</html>.*/v1"),
                               (200, '{"error": "overloaded"}', "KeyError: 'choices'.*overloaded"),
                               (200, '{"choices": []}', "IndexError.*choices"), (200, "[]", "TypeError.*/v1")]:
        with server_that([(status, {}, body)]) as policy, pytest.raises(PolicyError, match=told): policy.ask(START)


class Scripted:
    "Plays a list of actions, step by step."
    name, batch_size = "scripted", 2
    def __init__(self, actions): self.actions = actions
    def reset(self): pass
    def describe(self): return {"name": "scripted"}
    def act(self, trajectories, experiences, keys): return [Action(self.actions[len(t)], 1, 1, 1, "end") for t in trajectories]


def test_scienceworld_with_a_simulator_that_is_killed():
    task = scienceworld_tasks("test", ["find-living-thing"])[0]
    worlds = []
    class Mortal(ScienceWorldEnv):
        def __init__(self): super().__init__(); worlds.append(self)
        def step(self, action):
            if len(worlds) == 1 and self.steps == 1: self._process.kill()
            return super().step(action)
    done, = rollout(Scripted(["look around", "inventory", "open door to hallway"]), Mortal, [task], caps={task.type: 3})
    assert done.provenance["restarts"] == 1 and len(worlds) == 2 and done.provenance["stop"] == "cap"
    assert done.actions == ("look around", "inventory", "open door to hallway") and done.world_version and done.settings["simplification"] == "easy"


def test_scienceworld_with_a_model():
    tokenizer = make_tokenizer("qwen")
    policy = HFPolicy(make_model("qwen", len(tokenizer), max_position_embeddings=8192), tokenizer, max_new_tokens=6)
    tasks = scienceworld_tasks("test", ["find-plant"])[:2]
    done = list(rollout(policy, ScienceWorldEnv, tasks, caps={"find-plant": 3}, batch_size=1))  # one simulator plays both
    assert [t.task for t in done] == list(tasks) and all(len(t) == 3 and t.goal.startswith("Your task") for t in done)
    assert all(VIEWS["actions"](t) for t in done)


# ---- asked again ----

class Changing(Recall):
    "Recalls another episode every two steps, and remembers how often it was asked."
    asked, period = 0, 2
    def recall(self, trajectory):
        type(self).asked += 1
        word = WORDS[len(trajectory) // self.period]
        return self.Selection(Trajectory(Task("echo", "t9", "0", "train"), f"{trajectory.goal[::-1]} {word}", "look", (Step(f"use {word}", "ok"),)).finish(100.0, True))


def asks(run): return {t: x.provenance["asks"] for t, x in run.items()}


def test_asked_again_gives_the_same_cached_uncached_alone_and_in_a_batch():
    tasks = TASKS[:24]
    runs = {name: play(policy_of(**settings), tasks, Dynamic(Changing(), Every(1))) for name, settings in
            {"batch": {}, "three": {"batch_size": 3}, "alone": {"batch_size": 1}, "uncached": {"batch_size": 1, "cache": False}}.items()}
    assert all({t: x.id for t, x in run.items()} == {t: x.id for t, x in runs["uncached"].items()} and asks(run) == asks(runs["uncached"]) for run in runs.values())
    for t, x in runs["batch"].items():
        asked = CAPS[t.type]
        assert x.provenance["asks"]["asked"] == asked and x.provenance["asks"]["rebuilt"] == (asked > 2)
        assert [step for step, _ in x.provenance["asks"]["shown"]] == [0, 2][:1 + (asked > 2)] and len(x.provenance["retrieved"]) == 1 + (asked > 2)
        assert x.provenance["memory"] == {"kind": "test", "asked": {"when": "every", "steps": 1}}
    static = play(policy_of(), tasks, Changing())
    assert any(static[t].actions != runs["batch"][t].actions for t in tasks if t.type == "t2"), "what is read decides what is done"
    assert all(static[t].actions[:2] == runs["batch"][t].actions[:2] for t in tasks)
    json.dumps(runs["batch"][tasks[2]].to_dict())


def test_an_answer_that_is_the_same_keeps_the_cache():
    class Same(Changing): period = 99
    static, asked = play(policy_of(), TASKS[:9], Same()), play(policy_of(), TASKS[:9], Dynamic(Same(), Every(1)))
    assert all(asked[t].id == static[t].id and asked[t].provenance["tokens"] == static[t].provenance["tokens"] for t in static)
    assert all(a["rebuilt"] == 0 and a["asked"] == CAPS[t.type] for t, a in asks(asked).items())
    moving, long = play(policy_of(), TASKS[2:9:3], Dynamic(Changing(), Every(1))), TASKS[2]
    assert moving[long].provenance["tokens"]["computed"] > asked[long].provenance["tokens"]["computed"], "another memory block is another beginning"


def test_static_retrieval_asks_once_and_says_what_it_said():
    Changing.asked = 0
    static = play(policy_of(), TASKS[:9], Changing())
    assert Changing.asked == 9
    assert set(static[TASKS[0]].provenance) == {"actor", "policy", "memory", "retrieved", "stop", "tokens", "seconds", "restarts"}
    once = play(policy_of(), TASKS[:9], Dynamic(Changing(), Once()))
    assert all(once[t].id == static[t].id and once[t].provenance["tokens"] == static[t].provenance["tokens"] for t in static)


def test_a_restarted_episode_asks_anew():
    memory = Dynamic(Changing(), Every(1))
    whole = play(policy_of(batch_size=3), TASKS[:6], memory)
    Echo.deaths = ((str(TASKS[2]), 3), (str(TASKS[5]), 4))
    again = play(policy_of(batch_size=3), TASKS[:6], memory)
    assert {t: x.id for t, x in whole.items()} == {t: x.id for t, x in again.items()} and asks(whole) == asks(again) and again[TASKS[2]].provenance["restarts"] == 1


def test_dynamic_is_the_memory_it_was_made_of():
    import copy
    class Viewed(Recall): view, composition = "actions", "matched"
    memory = Dynamic(Viewed(), Every(5))
    assert memory.view == "actions" and memory.composition == "matched" and copy.copy(memory).view == "actions" and "Every(steps=5)" in repr(memory)
    assert memory.fingerprint != Dynamic(Viewed(), Every(4)).fingerprint
    with pytest.raises(AttributeError): memory.nothing_like_it


# ---- the words of a world ----

class House(Echo):
    "A world that says it is ALFWorld's newer or older release."
    grammar = "move"
    @property
    def settings(self): return {"grammar": self.grammar}


class OldWords(Recall):
    "Recalls an episode in the older language."
    told = Trajectory(Task("alfworld", "pick_and_place_simple", "g", "train"), "put a mug in a desk", "You are in the middle of a room.",
                      (Step("go to desk 1", "On the desk 1, you see nothing."), Step("put mug 1 in/on desk 1", "You put the mug 1 in/on the desk 1.")),
                      settings={"grammar": "put"}).finish(1.0, True)
    def recall(self, trajectory): return self.Selection(self.told)


class Watching:
    "Keeps what it was shown."
    name, batch_size, format = "watching", 2, FORMAT
    def reset(self): pass
    def describe(self): return {}
    def act(self, trajectories, experiences, keys):
        self.shown = [self.format.messages(t, e)[0]["content"] for t, e in zip(trajectories, experiences)]
        return [Action("look", 1, 1, 1, "end")] * len(trajectories)


HOUSE = Task("alfworld", "pick_and_place_simple", "here", "test")


class OldHouse(House): grammar = "put"


@pytest.mark.parametrize("world, said, grammar", [(House, "> move mug 1 to desk 1 |", "move"), (OldHouse, "> put mug 1 in/on desk 1 |", "put")])
def test_experience_is_shown_in_the_words_of_the_world(world, said, grammar):
    policy = Watching()
    done, = rollout(policy, world, [HOUSE], OldWords(), caps={HOUSE.type: 1})
    assert said in policy.shown[0] and list(done.provenance["retrieved"]) == [OldWords.told.id], "the name that it has in the store"
    held = [policy_of(format=format, constrain="templates").draft(0, done, ()).templates for format in (PromptFormat(), FORMAT)]
    assert held == [action_templates("alfworld", {"grammar": grammar}), ()], "what it may write is in the words of the world too"


def test_an_agent_held_to_templates_may_answer_the_question_that_the_world_asks():
    policy, begun = policy_of(constrain="templates"), Trajectory(Task("scienceworld", "grow-plant", "0", "test"), "grow an apple", "a greenhouse")
    question = begun.with_step(Step("move seed to pot", "Ambiguous request: Please enter the number (or blank to cancel):\n0:\tmove seed (in jar)\n1:\tmove seed (in pot)\n"))
    answered = question.with_step(Step("0", "You move the seed. 3:\tno question"))
    listed, asked, after = (policy.draft(0, t, ()).templates for t in (begun, question, answered))
    assert asked == (*listed, "0", "1") and after == listed


@pytest.mark.parametrize("world", [House, OldHouse])
def test_what_tells_one_memory_from_another_is_the_text_that_the_agent_reads(world):
    class Plain(Watching): format = PromptFormat()
    episode = Episode(0, HOUSE, world())
    episode.begin(), episode.remember(OldWords(), Plain())
    assert episode.refresher.names == PromptFormat().messages(episode.trajectory, episode.told.experiences)[0]["content"]


def test_worlds_of_one_language_and_of_none_are_left_alone():
    policy = Watching()
    done, = rollout(policy, Echo, [TASKS[0]], OldWords(), caps=CAPS)
    assert "> put mug 1 in/on desk 1" in policy.shown[0] and list(done.provenance["retrieved"]) == [OldWords.told.id]


def test_experience_that_cannot_be_translated_is_refused(monkeypatch):
    class Mixed(OldWords):
        told = Trajectory(OldWords.told.task, "put a mug in a desk", "A room.", (Step("put mug 1 in/on desk 1", "You put the mug 1 in/on the desk 1."), Step("move mug 1 to desk 1", "ok"))).finish(1.0, True)
    with pytest.raises(TrajectoryError, match="speaks both languages .*say which"): list(rollout(Watching(), House, [HOUSE], Mixed(), caps={HOUSE.type: 1}))
    def rules(trajectory): return "always put things in/on desks"
    rules.sources = lambda trajectory: (trajectory.id,)
    monkeypatch.setitem(VIEWS, "my rules", rules)
    class Rules(OldWords): view = "my rules"
    class Reader(Watching): format = PromptFormat(FORMAT.instruction, (), "my rules")
    with pytest.raises(PolicyError, match="write it from translated episodes"): list(rollout(Reader(), House, [HOUSE], Rules(), caps={HOUSE.type: 1}))
