"Conversations: what goes out comes back."
import json
import subprocess
import sys

import pytest
from hypothesis import given, strategies as st
from trajectory_strategies import calm, example, text, trajectories

from exprag.logs.messages import read_conversation, write_conversation
from exprag.trajectory import TrajectoryError
from exprag.views import from_messages, to_messages


@calm
@given(trajectories)
def test_messages_round_trip(trajectory):
    back = from_messages(json.loads(json.dumps(to_messages(trajectory))), trajectory.task, settings=trajectory.settings)
    assert back.id == trajectory.id


@calm
@given(trajectories)
def test_messages_round_trip_as_text(trajectory):
    try: messages = to_messages(trajectory, thoughts="text")
    except TrajectoryError as error:
        assert "thoughts='field'" in str(error)
        return
    assert from_messages(messages, trajectory.task, thoughts="text", settings=trajectory.settings).id == trajectory.id


@calm
@given(trajectories, st.lists(text, min_size=2, max_size=2), text)
def test_system_and_preamble_survive(trajectory, preamble, system):
    messages = to_messages(trajectory)
    before = [{"role": "system", "content": system}, {"role": "user", "content": preamble[0]}, {"role": "assistant", "content": preamble[1]}]
    read = from_messages(before + messages, trajectory.task, preamble=2, settings=trajectory.settings)
    assert read.id == trajectory.id and to_messages(read) == before + messages


@pytest.mark.parametrize("roles, said", [
    (["assistant"], "message 1"), ([], "message 1"), (["user", "user"], "message 2"), (["user", "assistant", "assistant"], "messages 2 and 3"),
    (["user", "assistant", "user", "user"], "two user turns"), (["user", "robot"], "message 2 has role 'robot'"), (["user", "tool"], "message 2"),
    (["user", "assistant", "tool"], "no call has as its id")])
def test_what_is_no_episode_is_refused_with_its_place(roles, said):
    messages = [{"role": role, "content": "x"} for role in roles]
    with pytest.raises(TrajectoryError, match=said): from_messages(messages, example().task)


def test_image_parts_are_refused():
    messages = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]
    with pytest.raises(TrajectoryError, match="only text"): from_messages(messages, example().task)


@pytest.mark.parametrize("content", [3, {"text": "x"}, [{"type": "text"}], [{"type": "text", "text": 3}], ["x"]])
def test_content_that_is_no_text_is_refused(content):
    with pytest.raises(TrajectoryError, match="expected text|only text"): from_messages([{"role": "user", "content": content}], example().task)


def test_import_is_light():
    code = "import sys, exprag.views; print(any(m in sys.modules for m in ('torch', 'numpy', 'py4j')))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "False"


def test_a_weight_is_kept_and_says_what_is_imitated():
    """OpenAI's fine-tuning files mark what is not to be learnt with `weight: 0`, ShareGPT's with `loss: false`."""
    said = [("user", "Open the door.", {}), ("assistant", "kick door", {"weight": 0}), ("user", "It stays closed.", {}), ("assistant", "open door", {"weight": 1})]
    messages = [{"role": role, "content": text, **mark} for role, text, mark in said]
    read = read_conversation(messages)
    assert [s.imitated for s in read.steps] == [False, True] and write_conversation(read) == messages
    marked = [{**{k: v for k, v in m.items() if k != "weight"}, **({"loss": False} if m.get("weight") == 0 else {})} for m in messages]
    assert [m.get("weight") for m in write_conversation(read_conversation(marked))] == [None, 0, None, None]
