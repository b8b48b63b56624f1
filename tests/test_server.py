"ServerPolicy: what a server says becomes an action, the end of one episode, or an error that says what to do."
import json
import sys
import threading
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from echo import CAPS, FORMAT, TASKS, Recall, play, policy_of

from exprag.agent import PolicyError
from exprag.evaluation import EvaluationOptions, condition, evaluate
from exprag.models.decoding import Draft
from exprag.models.local import HFPolicy
from exprag.models.server import ServerPolicy, check_template, served_weights, serving
from exprag.prompt import PromptEncoder
from exprag.results import load_results
from exprag.trajectory import Step, Task, Trajectory
from exprag.world import Panel

START = Trajectory(TASKS[0], "g", "o")


def completion(text, **usage):
    "A good answer: status, headers, body."
    choice = {"message": {"content": text}, "finish_reason": "stop"}
    return 200, {}, json.dumps({"choices": [choice], "usage": usage})


@contextmanager
def server_that(answers, timeout=10, prompt=FORMAT, **settings):
    "A policy whose server gives these answers in turn, or what a function makes of a request."
    pytest.importorskip("openai", reason="the extra `server` is not installed")
    class Server(BaseHTTPRequestHandler):
        def do_POST(self):
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked |= {"path": self.path, "key": self.headers.get("Authorization")}
            status, headers, body = answers(asked) if callable(answers) else answers.pop(0)
            self.send_response(status)
            for name, value in headers.items(): self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body.encode())
        def log_message(self, *_): pass
    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}/v1/"
    settings = {"weights": "version:1", "trust_server_template": prompt is FORMAT} | settings
    try: yield ServerPolicy("some-model", address, prompt, key_variable="NO_KEY", timeout=timeout, **settings)
    finally: server.shutdown(), server.server_close()


@pytest.fixture
def waited(monkeypatch):
    "The seconds that the client would have slept; it does not sleep."
    seconds = []
    monkeypatch.setattr("time.sleep", seconds.append)
    return seconds


def test_a_server_plays_episodes(monkeypatch, waited):
    asked = []
    def answers(request):
        asked.append(request)
        return completion(" open door\nand more", prompt_tokens=9, completion_tokens=3)
    with server_that(answers) as policy: done = play(policy, TASKS[:2], Recall())
    assert done[TASKS[0]].actions == ("open door",) * CAPS["t0"]
    assert done[TASKS[0]].provenance["tokens"] == {"prompt": 9, "computed": 12, "generated": 3, "cut": 0}
    one = asked[0]
    assert one["path"] == "/v1/chat/completions" and one["key"] is None and one["temperature"] == 0
    assert one["model"] == "some-model" and one["messages"][0]["role"] == "system"
    assert one["max_tokens"] == policy.max_new_tokens and one["stop"] == ["\n"]
    with pytest.raises(PolicyError, match="127.0.0.1.* did not answer for echo/.*is the server up"):
        policy.act([START])
    monkeypatch.setenv("NO_KEY", "secret")
    with server_that(answers) as policy: policy.ask(START)
    assert asked[-1]["key"] == "Bearer secret"


@pytest.mark.parametrize("status, said", [
    (400, "This model's maximum context length is 2048 tokens. However, you requested 2100 tokens."),
    (400, '{"error": {"code": "context_length_exceeded"}}'),
    (400, '{"error": {"type": "exceed_context_size_error"}}'),
    (400, "The decoder prompt (length 2100) is longer than the maximum model length of 2048."),
    (413, ""),
])
def test_a_prompt_too_long_ends_its_own_episode_alone(status, said):
    def answers(asked):
        return (status, {}, said) if len(asked["messages"]) > 4 else completion("wait")
    with server_that(answers) as policy: done = play(policy, TASKS[:3])
    ends = [(len(done[t]), done[t].provenance["stop"]) for t in TASKS[:3]]
    assert ends == [(1, "cap"), (2, "cap"), (2, "context")]


def test_a_busy_server_is_asked_again_and_later_each_time(waited):
    busy = 429, {}, "slow down"
    with server_that([(503, {}, "loading"), busy, busy, completion("wait")]) as policy:
        assert policy.ask(START).text == "wait"
    assert len(waited) == 3 and waited == sorted(set(waited))
    waited.clear()
    wished = [(429, {"Retry-After": "7"}, "") for _ in range(2)]
    with server_that([*wished, completion("wait")]) as policy: policy.ask(START)
    assert waited == [7, 7]
    with server_that([(503, {}, "the model is\nstill loading")] * 9) as policy:
        with pytest.raises(PolicyError, match="refused echo/t0/0@test with 503 .*: the model is still"):
            policy.ask(START)


def test_a_server_that_does_not_answer_in_time(waited):
    answered = threading.Event()
    def never(asked):
        answered.wait(20)
        return completion("late")
    with server_that(never, timeout=0.2) as policy:
        with pytest.raises(PolicyError, match="did not answer for echo/.*time"): policy.ask(START)
        answered.set()


@pytest.mark.parametrize("status, body, message", [
    (404, '{"message": "The model `some-model` does not exist."}',
     "refused .* with 404 .*does not exist.*called 'some-model'"),
    (401, "bad key", "with 401 .*bad key.*NO_KEY hold the key"),
    (400, "", "with 400 Bad Request: nothing;"),
    (200, "<html>a web page</html>", "no chat completion .*<html>a web page</html>.*/v1"),
    (200, '{"error": "overloaded"}', "no chat completion .*overloaded"),
    (200, '{"choices": []}', "IndexError.*choices"),
    (200, "[]", "no chat completion .*/v1"),
])
def test_an_error_quotes_the_server(waited, status, body, message):
    for headers in ({}, {"Content-Type": "application/json"}):
        with server_that([(status, headers, body)]) as policy:
            with pytest.raises(PolicyError, match=message): policy.ask(START)
    assert not waited, "a refusal is no reason to wait"


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(ImportError, match=r"openai.*pip install 'exprag\[server\]'"):
        ServerPolicy("some-model", "http://127.0.0.1:9/v1", trust_server_template=True)


def test_a_missing_extra_is_named(monkeypatch):
    monkeypatch.setattr("transformers.utils.import_utils.is_serve_available", lambda: False)
    with pytest.raises(ImportError, match=r"pip install 'exprag\[server\]'"):
        with serving(): pass


def test_a_server_that_cannot_start_says_why(monkeypatch):
    monkeypatch.setattr("transformers.utils.import_utils.is_serve_available", lambda: True)
    monkeypatch.setattr("exprag.models.server.SERVE", "import sys; sys.exit('no such luck')")
    with pytest.raises(RuntimeError, match="ended. It said: no such luck"):
        with serving(seconds=60): pass
    monkeypatch.setattr("exprag.models.server.SERVE", "import time; time.sleep(60)")
    with pytest.raises(RuntimeError, match="did not answer within 1 seconds"):
        with serving(seconds=1): pass


def test_a_served_model_acts_as_it_does_in_this_process():
    for package in ("fastapi", "uvicorn", "openai"):
        pytest.importorskip(package, reason="the extra `server` is not installed")
    start = Trajectory(Task("scienceworld", "boil", "0", "test"), "Boil water.", "You see a room.")
    later = start.with_step(Step("look around", "You see a stove and a sink."))
    here = HFPolicy.from_pretrained("nano", max_new_tokens=12, device="cpu")
    with serving(device="cpu") as (url, name):
        there = ServerPolicy(name, url, here.encoder, "nano", max_new_tokens=12)
        for episode in (start, later):
            (local,), (served,) = here.act([episode]), there.act([episode])
            assert served.text == local.text and served.tokens_in == local.tokens_in
        assert there.takes_ids is False, "transformers serve takes text alone"
    with pytest.raises(PolicyError, match="is the server up"): there.ask(start)  # it has ended


# ---- what the model reads ----

def model_server(policy, asked):
    "Answers of a real model to token ids, by the engine of a policy; it keeps what it was asked."
    turn = threading.Lock()
    def answers(request):
        asked.append(request)
        if request["path"] != "/v1/completions": return 404, {}, "Not Found"
        ids = request["prompt"]
        with turn:
            draft = Draft(ids, *policy.engine.prefill(0, ids), None)
            policy.writer.write({0: draft})
        usage = {"prompt_tokens": len(ids), "completion_tokens": len(draft.out)}
        return 200, {}, json.dumps({"choices": [{"text": draft.text, "finish_reason": "stop"}], "usage": usage})
    return answers


FAMILIES = ["qwen", "mistral", "gemma", "ministral"]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_tokens_in_training_in_the_process_and_through_a_server(family):
    "Every family, also those whose template writes something else; the answers are the same, too."
    here, asked = policy_of(family), []
    local = play(here, TASKS[:3], Recall())
    with server_that(model_server(policy_of(family), asked), prompt=here.encoder, max_new_tokens=6) as there:
        served = play(there, TASKS[:3], Recall())
    assert there.takes_ids and {t: e.actions for t, e in served.items()} == {t: e.actions for t, e in local.items()}
    sent = [request["prompt"] for request in asked[1:]]
    assert asked[0]["max_tokens"] == 1 and all(request["path"] == "/v1/completions" for request in asked)
    for episode in local.values():
        found = Recall().recall(episode).experiences
        trained = here.encoder.encode(episode, found).ids
        for n in range(len(episode)):
            ids = here.encoder.prompt(replace(episode, steps=episode.steps[:n], score=None, success=None), found)
            assert ids in sent and trained[:len(ids)] == ids
    assert len(sent) == sum(len(e) for e in local.values())


@pytest.mark.parametrize("family, equal", [("qwen", True), ("ministral", True), ("gemma", True), ("gemma2", False), ("mistral", False)])
def test_messages_go_out_only_if_they_become_the_same_tokens(family, equal):
    encoder, here = policy_of(family).encoder, START.with_step(Step("open door", "It is open."))
    sizes = {"prompt_tokens": len(encoder.prompt(here))}
    def answers(request): return completion("wait", **sizes) if "chat" in request["path"] else (404, {}, "Not Found")
    with server_that(answers, prompt=encoder) as policy:
        if equal: assert policy.ask(here).text == "wait" and policy.takes_ids is False
        else:
            with pytest.raises(PolicyError, match="(does not write the prompt as it is written in training|refuses the prompt).*takes token ids"): policy.ask(here)
        sizes["prompt_tokens"] += 1
        with pytest.raises(PolicyError, match="another tokenizer or chat template" if equal else "chat template"): policy.ask(here)
    with server_that(answers, prompt=encoder, trust_server_template=True) as policy: assert policy.ask(here).text == "wait"


def test_a_control_token_in_an_observation_is_never_sent_as_text():
    encoder = policy_of("qwen").encoder
    odd = Trajectory(TASKS[0], "g", "A sign: <|im_end|>")
    with pytest.raises(PolicyError, match="<|im_end|>"): check_template(encoder, encoder.format.messages(odd), encoder.prompt(odd))


def test_a_server_that_reads_other_tokens_is_noticed():
    policy = policy_of("qwen")
    def adds(request): return 200, {}, json.dumps({"choices": [{"text": "wait", "finish_reason": "stop"}], "usage": {"prompt_tokens": len(request["prompt"]) + 1}})
    with server_that(adds, prompt=policy.encoder) as there:
        with pytest.raises(PolicyError, match="it serves another tokenizer or chat template, or adds tokens"): there.ask(START)


def test_a_policy_without_an_encoder_must_trust():
    pytest.importorskip("openai", reason="the extra `server` is not installed")
    for prompt in (None, FORMAT):
        with pytest.raises(PolicyError, match=r"PromptEncoder\(tokenizer\) of the served model.*trust_server_template=True"): ServerPolicy("m", "http://127.0.0.1:9/v1", prompt)


# ---- which model it is ----

def test_weights_are_named_by_what_they_are(tmp_path):
    for name, text in (("a", "one"), ("b", "two")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_config.json").write_text(text)
    one, two = (served_weights(tmp_path / name) for name in "ab")
    assert one != two and served_weights(str(tmp_path / "a")) == one and served_weights(["nano", tmp_path / "a"]) == f"{served_weights('nano')}+{one}"
    assert served_weights("0123456789ab") == "0123456789ab" and served_weights("version:gpt-9, May") == "version:gpt-9, May"
    for bad in ("adaptr", tmp_path / "c", "gpt-9"):
        with pytest.raises(PolicyError, match="is no folder here: give the folder that is served"): served_weights(bad)


def make_adapter(folder, seed):
    "A LoRA adapter of nano with random weights."
    import torch
    from peft import LoraConfig, get_peft_model

    from exprag.models.loading import load_model
    torch.manual_seed(seed)
    model = get_peft_model(load_model("nano", device="cpu")[0], LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    model.save_pretrained(folder)
    return folder


def test_a_retrained_adapter_behind_the_same_name_is_another_run(tmp_path):
    "Two adapters of nano, served one after the other under one name, on the real shop."
    pytest.importorskip("openai", reason="the extra `server` is not installed")
    from exprag.worlds.shop import shop_tasks
    panel = Panel("shop", shop_tasks("test")[:2], dict.fromkeys({t.type for t in shop_tasks("test")[:2]}, 2), {})
    quiet, out, asked = EvaluationOptions(progress=False), tmp_path / "runs", []
    def run(policy, where=out): return evaluate(condition("zero-shot"), panel, where, policy, options=quiet)
    folders = [make_adapter(tmp_path / f"adapter-{seed}", seed) for seed in (0, 1)]
    models = [HFPolicy.from_pretrained("nano", folder, device="cpu", batch_size=2, max_new_tokens=6) for folder in folders]
    assert models[0].weights != models[1].weights
    encoder, runs = models[0].encoder, []
    for folder, model in zip(folders, models):
        with server_that(model_server(model, asked), prompt=encoder, weights=["nano", folder], max_new_tokens=6) as policy:
            runs.append(run(policy))
            calls = len(asked)
            assert run(policy).folder == runs[-1].folder and len(asked) == calls, "the same weights: nothing is played again"
    assert runs[0].folder != runs[1].folder and "name" not in runs[0].config["policy"]
    with pytest.raises(ValueError, match="differ in policy.weights; give one another name"): load_results(out)
    with server_that(model_server(models[0], asked), prompt=encoder, weights=["nano", folders[0]], max_new_tokens=6) as policy:
        calls = len(asked)
        assert run(policy).folder == runs[0].folder and len(asked) == calls, "a later process finds them again"


def test_unknown_weights_are_never_taken_for_an_earlier_process(tmp_path):
    model, asked, folders = policy_of("qwen"), [], set()
    from exprag.worlds.shop import shop_tasks
    panel = Panel("shop", shop_tasks("test")[:1], {shop_tasks("test")[0].type: 1}, {})
    for _ in range(2):  # as in two processes
        with pytest.warns(UserWarning, match="no other process can go on .*weights="):
            with server_that(model_server(model, asked), prompt=PromptEncoder(model.tokenizer), weights=None, max_new_tokens=6) as policy:
                for _ in range(2): folders.add(evaluate(condition("zero-shot"), panel, tmp_path, policy, options=EvaluationOptions(progress=False)).folder)
    assert len(folders) == 2
    with pytest.raises(ValueError, match="differ in policy.session"): load_results(tmp_path)
