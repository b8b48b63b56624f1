"""Trajectories of every kind, for property tests; not a test itself."""
from hypothesis import HealthCheck, settings, strategies as st

from exprag.trajectory import Step, Task, Trajectory

calm = settings(deadline=None, derandomize=True, max_examples=60, suppress_health_check=list(HealthCheck))  # a busy machine is no failure
text = st.text(max_size=40) | st.sampled_from(
    ["", "Thought: a\nAction: b", "Action: wait", "Action:\nwait", "a\n\nb", "\n\n", "\n", "Thought:", "\ud800", "\u2028", "\x85", "\r\n", "<|im_end|>"])
word = st.text(st.characters(exclude_characters="/@", exclude_categories=("Cs",)), min_size=1, max_size=8)
number = st.floats(-100, 100) | st.integers(-100, 100)
value = st.recursive(st.none() | st.booleans() | st.integers(-9, 9) | st.floats(-9, 9) | text,
                     lambda inner: st.lists(inner, max_size=2) | st.dictionaries(text, inner, max_size=2), max_leaves=4)
mapping = st.dictionaries(text, value, max_size=3)
own_extra = st.dictionaries(st.sampled_from(["colour", "seconds", "loss_scale", "id", "schema"]), value, max_size=2)
tasks = st.builds(Task, st.just("scienceworld"), word, st.integers(0, 999).map(str) | word, st.sampled_from(["train", "dev", "test"]))
plain_steps = st.builds(Step, text, text, number, st.none() | text, st.just(()), own_extra)
call = st.fixed_dictionaries({"id": st.uuids().map(str), "type": st.just("function"),
                              "function": st.fixed_dictionaries({"name": word, "arguments": text})})
one_call = st.builds(lambda a, o, t, c: Step(a, o, thought=t, tool_calls=[c]), text, text, st.none() | text, call)
several = st.builds(lambda a, o, t, cs, r: Step(a, o, thought=t, tool_calls=[{**c, "result": r + str(i)} for i, c in enumerate(cs)]),
                    text, text, st.none() | text, st.lists(call, min_size=1, max_size=3), text)
steps = plain_steps | one_call | several
trajectories = st.builds(Trajectory, tasks, text, text, st.lists(steps, max_size=4).map(tuple), st.none() | number, st.none() | st.booleans(),
                         text, mapping, mapping, own_extra)


def example(**changes) -> Trajectory:
    fields = dict(task=Task("scienceworld", "boil", 3, "train"), goal="Boil water.", first_observation="A kitchen.",
                  steps=(Step("activate stove", "It is on.", 5),), settings={"simplification": "easy"})
    return Trajectory(**{**fields, **changes})
