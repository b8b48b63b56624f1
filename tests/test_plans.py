"A plan says everything that decides a result; what is wrong with it is one line."
import tomllib
from dataclasses import replace
from importlib.resources import files

import pytest

from exprag.plans import (Plan, PlanError, collect_tasks, load_plan, plan_names, plan_panels,
                          prompt_format, sft_config, variants)
from exprag.world import load_world

MINIMAL = 'name = "mine"\nworld = "shop"\nmodel = "nano"\n'


@pytest.mark.parametrize("name", plan_names())
def test_every_shipped_plan_is_sound(name):
    plan = load_plan(name)
    assert plan.name == name and plan.about.endswith(".")
    names = [(v.condition.name, v.condition.seed) for v in variants(plan)]
    assert len(set(names)) == len(names)
    world, tasks = load_world(plan.world), collect_tasks(plan)
    assert {t.fold for t in tasks} == {"train"} and len(set(tasks)) == len(tasks)
    assert {t.type for t in tasks} <= set(world.easy + world.hard) - set(plan.leave_out)
    assert not {t for p in plan_panels(plan) for t in p} & set(tasks)


def test_the_papers_plans_have_the_papers_settings():
    for name, epochs in (("paper-alfworld", 9), ("paper-scienceworld", 29)):
        plan = load_plan(name)
        config = sft_config(plan, 2025)
        assert (config.r, config.alpha, config.dropout, config.lr) == (8, 16, 0.1, 5e-5)
        assert (config.epochs, config.schedule, config.weight_decay) == (epochs, "constant", 0)
        assert (plan.memory.k, plan.memory.when, plan.memory.view) == (2, "once", "chat")
        assert (plan.memory.key, plan.memory.composition) == ("goal", "matched")
        assert plan.evaluate.conditions == Plan("x", "shop").evaluate.conditions
    assert len(plan_panels(load_plan("paper-alfworld"))[0]) == 134
    assert len(plan_panels(load_plan("paper-scienceworld"))[0]) == 149


def test_a_file_reads_back(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(MINIMAL + '[memory]\nk = 3\n[train]\nseeds = [1, 2]\n')
    plan = load_plan(path)
    assert plan.memory.k == 3 and plan.train.seeds == (1, 2)
    assert load_plan(path, ["memory.k=3"]) == plan
    trained = [v.condition for v in variants(plan) if v.condition.adapter != "none"]
    assert sorted({c.seed for c in trained}) == [1, 2] and len(trained) == 6


@pytest.mark.parametrize("text, said", [
    ("x = ", "is not TOML"),
    ('name = "a"\n', "world is missing"),
    (MINIMAL + 'wrold = "x"\n', "did you mean 'world'"),
    (MINIMAL + "memory = 3\n", "must be a table"),
    (MINIMAL + "[memory]\nk = true\n", "memory.k is True"),
    (MINIMAL + "[memory]\nview = 'chta'\n", "chta"),
    (MINIMAL + "[memory]\nkey = 'goaal'\n", "goaal"),
    (MINIMAL + "[memory]\nwhen = 'sometimes'\n", "every N"),
    (MINIMAL + "[memory]\ncomposition = 'eazy'\n", "eazy"),
    (MINIMAL + "[train]\nseeds = []\n", "at least one seed"),
    (MINIMAL + "[train.change]\nr = 0\n", "must be at least 1"),
    (MINIMAL + "[prompt]\ninstructions = 'x'\n", "did you mean 'instruction'"),
    (MINIMAL + "[[evaluate.vary]]\nk = [1]\n", "names no condition"),
    (MINIMAL + "[[evaluate.vary]]\ncondition = 'LoRA'\nk = 1\n", "must be a list"),
    (MINIMAL + "[[evaluate.vary]]\ncondition = 'LoRA'\nlr = [1]\n", "setting of evaluate.vary"),
    ('name = "a"\nworld = "shpo"\n', "shpo"),
])
def test_what_is_wrong_is_said(tmp_path, text, said):
    path = tmp_path / "wrong.toml"
    path.write_text(text)
    with pytest.raises(PlanError, match=said) as raised: load_plan(path)
    assert "wrong.toml" in str(raised.value) and "\n" not in str(raised.value)


def test_a_plan_that_is_not_there(tmp_path):
    with pytest.raises(PlanError, match="does not exist"): load_plan(tmp_path / "none.toml")
    with pytest.raises(ValueError, match="did you mean 'paper-alfworld'"): load_plan("paper-alfwrld")


def test_a_plan_can_be_of_some_types_only():
    plan = load_plan("quick-shop", ["types=['count-orders', 'best-seller']", "evaluate.cap=3"])
    (panel,), (whole,) = plan_panels(plan), plan_panels(load_plan("quick-shop"))
    assert {t.type for t in collect_tasks(plan)} == {"count-orders", "best-seller"} >= {t.type for t in panel}
    assert 0 < len(panel) < len(whole) and set(panel.tasks) <= set(whole.tasks) and set(panel.caps.values()) == {3}
    assert set(panel.left_out) == {t.type for t in whole} - {t.type for t in panel}
    less = load_plan("quick-shop", ["leave_out=['best-seller']"])
    assert {t.type for t in collect_tasks(less)} == {t.type for t in collect_tasks(load_plan("quick-shop"))} - {"best-seller"}
    with pytest.raises(PlanError, match="did you mean 'best-seller'"): load_plan("quick-shop", ["leave_out=['best-selle']"])


def test_stages_are_named_varied_and_checked():
    changes = ["memory.when='every 1'", "memory.stages=['track_progress', 'adapt_to_goal']",
               "evaluate.vary=[{condition='replay', when=['once'], stages=[['adapt_to_goal'], []]}]"]
    made = {v.condition.name: v for v in variants(load_plan("quick-shop", changes))}
    assert made["ExpRAG-LoRA"].stages == ("track_progress", "adapt_to_goal") and made["zero-shot"].stages == ()
    assert made["replay, when=once, stages=adapt_to_goal"].stages == ("adapt_to_goal",)
    assert made["replay, when=once, stages=none"].stages == ()
    for wrong, said in ((["memory.stages=['track_progres']"], "did you mean 'track_progress'"),
                        (["memory.stages=['track_progress']"], "write when = 'every 1'")):
        with pytest.raises(PlanError, match=said): load_plan("quick-shop", wrong)


def test_k_zero_is_the_condition_without_its_memory():
    changes = ["evaluate.vary=[{condition='ExpRAG-LoRA', k=[0, 1, 2]}]"]
    made = {v.condition.name: v.condition for v in variants(load_plan("quick-shop", changes))}
    none = made["ExpRAG-LoRA, k=0"]
    assert (none.memory, none.adapter, none.when) == ("none", "exprag-lora", "once")
    assert made["ExpRAG-LoRA, k=2"].k == 2 and "ExpRAG-LoRA, k=1" not in made


def test_only_what_decides_the_result_is_in_the_fingerprint():
    plan = load_plan("quick-shop")
    assert replace(plan, name="other", about="other").fingerprint == plan.fingerprint
    for changes in (["memory.k=2"], ["model=smollm2"], ["train.seeds=[1]"], ["dtype=bfloat16"]):
        assert load_plan("quick-shop", changes).fingerprint != plan.fingerprint


def test_files_are_the_plans_names():
    for name in plan_names():
        text = (files("exprag") / "assets" / "plans" / f"{name}.toml").read_text()
        assert tomllib.loads(text)["name"] == name


def test_the_view_of_the_prompt_is_the_memorys():
    assert prompt_format(load_plan("quick-shop")).view == "numbered"
    assert prompt_format(load_plan("quick-shop"), "chat").view == "chat"


def test_a_plan_sets_how_the_model_is_loaded_and_decodes(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(MINIMAL + '[loading]\nattention = "eager"\n[policy]\nconstrain = "templates"\n')
    plan = load_plan(path)
    assert plan.loading == {"attention": "eager"} and plan.policy == {"constrain": "templates"}
    assert plan.fingerprint != load_plan(path, ["policy.avoid_rejected=true"]).fingerprint
    for change, said in (("loading.atention=eager", "did you mean 'attention'"),
                         ("policy.constrain=all", "there are None"), ("dtype=float8", "unknown dtype"),
                         ("loading.dtype=float16", "The 3 known: revision, attention, four_bit"),
                         ("train.change.weights=nf5", "float32, bfloat16, nf4")):
        with pytest.raises(PlanError, match=said): load_plan(path, [change])


@pytest.mark.parametrize("name", ["smollm2-alfworld", "smollm2-scienceworld"])
def test_the_plans_for_a_gpu_hold_everything(name):
    plan = load_plan(name)
    world, config = load_world(plan.world), sft_config(plan, 2025)
    assert set(collect_tasks(plan)) == set(world.tasks("train"))
    assert (plan.memory.k, plan.memory.view, plan.memory.when) == (2, "chat", "once")
    assert config.epochs == {"alfworld": 9, "scienceworld": 29}[plan.world]
    kept = {v.epoch for v in variants(plan)} - {0} | {config.epochs}
    assert kept == set(config.keep_epochs) and sum(map(len, plan_panels(plan))) in (134, 149)
