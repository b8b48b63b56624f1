"""Inputs that once stopped a live agent, or its memory: each stands for a kind of fault."""
import asyncio
import json
import os
import sys
import threading
import time
import warnings
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from encoders import Letters
from hypothesis import given, settings
from hypothesis import strategies as st

from exprag.cli import in_options, main
from exprag.logs.files import read_log
from exprag.logs.formats import Options
from exprag.logs.messages import call_text
from exprag.memory.chat_memory import (
    OPENS, ChatMemory, ChatMemoryOptions, Receipt, as_messages, episode_of)
from exprag.memory.curation import Trust
from exprag.memory.hybrid import WordRetriever
from exprag.memory.maintenance import Redactor, check
from exprag.memory.utility import Use, usage
from exprag.query import Retriever, SentenceEncoder
from exprag.select import Every
from exprag.store import Store, StoreError
from exprag.trajectory import Step, Task, Trajectory, TrajectoryError, whole_text
from exprag.views import render

CASES = Path(__file__).parent / "data" / "cases"
settings.register_profile("patient", deadline=None)
settings.load_profile("patient")


def user(text): return {"role": "user", "content": text}
def agent(text, **more): return {"role": "assistant", "content": text, **more}
def conversation(name): return json.loads((CASES / name).read_text(encoding="utf-8"))


ASK, DONE = [user("Turn on the lamp.")], [agent("press switch"), user("It is on."), agent("Done.")]


@pytest.fixture
def store(tmp_path):
    with Store(tmp_path / "memory.db") as store: yield store


def memory_of(store, author="me", **options):
    return ChatMemory(store, Letters(), author, ChatMemoryOptions(**options))


def uses(store, id): return (lambda u: (u.uses, u.gain))(usage(store).get(id, Use()))


# Half characters (02)


def test_half_a_character_costs_only_itself(store, capsys):
    record = json.loads((CASES / "half_character.jsonl").read_text())
    memory = ChatMemory(store, SentenceEncoder(), author="me")
    kept = memory.record(record["messages"], True)
    assert store.get(kept.id) == kept and kept.goal == "Find \ufffd now"
    block = memory.augment([user("Find it \udc00 now")])[0]["content"]
    assert OPENS in block and "Find \ufffd now" in block
    block.encode("utf-8")
    assert memory.memory.recall(memory.episode([user("Find \udfff")])).ids == (kept.id,)
    assert WordRetriever(store).search(kept)[0].id == kept.id
    Retriever(store, SentenceEncoder(), "so_far", "so_far").search(kept)
    print(memory.recall([user("Find")]).explain(), kept.table(), kept, memory, render(kept, "chat"))
    capsys.readouterr().out.encode("utf-8")


odd = st.text(st.sampled_from("ab\ud83d\udc00\U0001f600é "), max_size=6)


@given(odd, odd)
def test_a_store_takes_any_text(tmp_path_factory, a, b):
    task = Task("w" + a.replace("/", ""), "t", "v" + b, "train")
    t = Trajectory(task, a, b, (Step(a, b),), 1.0, True, provenance={"author": a})
    with Store(tmp_path_factory.mktemp("odd") / "s.db") as store:
        store.add_many([t], namespace="n" + a)
        assert store.get(t.id).id == t.id and store.has_task(task)
        assert store.find(world=task.world, namespace="n" + a, authors=[a]) == [t.id]
        store.put_texts("goal", {t.id: a})
        store.match("goal", b)
        json.dumps([store.types(task.world), store.namespaces()], ensure_ascii=False).encode()
        found = check(store.path)
    assert found.ok, found


def test_whole_text():
    assert whole_text("a\ud83d\ude00\ud83db\udc00") == "a\U0001f600\ufffdb\ufffd"
    assert whole_text("é漢") == "é漢" and whole_text(7) == 7


def test_the_command_line_prints_half_characters(tmp_path, capsys):
    db = str(tmp_path / "s.db")
    assert main(["import", str(CASES / "half_character.jsonl"), "--store", db, "--author", "me"]) == 0
    assert main(["search", "Find", "--store", db]) == 0
    capsys.readouterr().out.encode("utf-8")
    with Store(db) as store:
        memory = memory_of(store)
        assert len(memory.recall([user("Find it")])) == 0, "its outcome is not known"
        assert store.find(authors=["me"]) == store.find() != []


# What looks like a secret (11)


KEPT = [
    *(m["content"] for m in conversation("versions.json")),
    "npm i @types/node@18.0.0-beta.rc1 react@18.3.0-canary.abc", "icon@2x.png and tool@v4.beta",
    "org-123@github.com:acme/tool.git", "ssh://git@example.org/acme/tool.git", "hg@example.org",
    "pip install lib==1.26.4.1 'x>=1.2.3.4'", '"version": "2.14.0.1"', r'{\"version\": \"2.14.0.1\"}',
    "wget tool-2.14.0.1.tar.gz", "Chrome/120.0.60.109", "upgraded from 2.14.0.1 to 2.14.0.2",
    'AssemblyVersion("1.0.0.0")', "tag v1.2.3.4", "999.1.2.3", "id 4111111111111112",
    "12345678-1234-1234-1234-123456789012", "41111111-4111-1111-1111-111111111111",
    "order_4111111111111111", "1234567890123456789", "sk-learn-contrib-extra-package"]
GONE = [
    "ann@example.org", "bob@163.com", "ann@müller.de", "to ann.b+c@mail.example.co.uk.",
    "https://user:token@example.com/a", "10.0.0.17", "root@10.0.0.1", "host=10.0.0.1",
    "http://192.168.0.1:80/x", "GET /hosts/10.0.0.1", "the server's version on 10.0.0.1",
    "4111 1111 1111 1111", "4111-1111-1111-1111", "5500000000000004", "378282246310005",
    "sk-proj-aB3dE5fG7hI9jK1l"]


@pytest.mark.parametrize("text", KEPT)
def test_what_is_no_secret_stays(text): assert Redactor().text(text, Counter()) == text


@pytest.mark.parametrize("text", GONE)
def test_what_is_a_secret_goes(text):
    counts = Counter()
    clean = Redactor().text(text, counts)
    assert counts.total() == 1 and clean != text and Redactor().text(clean, Counter()) == clean


@pytest.mark.parametrize("part", ["a@", "1.", "version ", "a.b@c.", "1 to ", "4111 ", "x@a-", "sk-"])
def test_the_time_is_linear_in_the_length(part):
    def seconds(n):
        start = time.process_time()
        Redactor().text(part * n, Counter())
        return time.process_time() - start
    assert min(seconds(40_000) for _ in range(3)) < 16 * min(seconds(10_000) for _ in range(3)) + 0.2


# A read-only place (25)


def in_a_read_only_place(folder, job):
    """Run a job in a child process that may not write to a folder: as another user, if we are root."""
    for path in folder.iterdir(): path.chmod(0o444)
    folder.chmod(0o555)
    reading, writing = os.pipe()
    if not (child := os.fork()):
        try:
            if os.getuid() == 0: os.setuid(65534)
            said = json.dumps(job())
        except BaseException as error: said = json.dumps(f"{type(error).__name__}: {error}")
        os.write(writing, said.encode())
        os._exit(0)
    os.close(writing)
    with open(reading, encoding="utf-8") as file: said = file.read()
    os.waitpid(child, 0)
    folder.chmod(0o755)
    for path in folder.iterdir(): path.chmod(0o644)
    return json.loads(said)


@pytest.fixture
def shelf(tmp_path):
    "A folder with a store that the world may read, and the id in it."
    for folder in (tmp_path, *tmp_path.parents):
        if folder.owner() == Path(tmp_path).owner() and folder.stat().st_mode & 0o055 != 0o055:
            try: folder.chmod(0o755)
            except OSError: pass
    (tmp_path / "ro").mkdir()
    with Store(tmp_path / "ro" / "s.db") as store:
        kept = memory_of(store).record(ASK + DONE, True)
    return tmp_path / "ro", kept.id


def test_a_store_in_a_read_only_place_is_read(shelf):
    folder, id = shelf
    def job():
        with Store(folder / "s.db") as store:
            memory = memory_of(store)  # there is no vector of it yet
            asked = memory.augment(ASK, "c")
            failed = []
            for change in (lambda: store.add(replace(store.get(id), goal="x")),
                           lambda: store.delete(id), lambda: memory.record(ASK + DONE, False)):
                try: change()
                except StoreError as error: failed.append("read-only" in str(error))
            sound = check(folder / "s.db")
            return [store.read_only, store.find(), OPENS in asked[0]["content"], asked.receipt,
                    failed, sound.ok, repr(sound)]
    *found, shown = in_a_read_only_place(folder, job)
    assert found == [True, [id], True, None, [True] * 3, True]
    assert "1 episodes, nothing wrong (read-only here" in shown
    assert sorted(p.name for p in folder.iterdir()) == ["s.db"]


def test_changes_in_the_log_are_not_passed_over(shelf):
    folder, id = shelf
    def writer():
        store = Store(folder / "s.db")
        store.add(replace(store.get(id), goal="later"))
        (folder / "copy").mkdir()
        for end in ("", "-wal"):
            (folder / "copy" / f"s.db{end}").write_bytes((folder / f"s.db{end}").read_bytes())
        store.close()
    writer()
    said = in_a_read_only_place(folder / "copy", lambda: len(Store(folder / "copy" / "s.db")))
    assert said == 2 or "read-only" in said and "-wal" in said


def test_an_older_schema_in_a_read_only_place_says_what_to_do(shelf):
    folder, _ = shelf
    with Store(folder / "s.db") as store, store.writing() as c: c.execute("PRAGMA user_version = 1")
    said = in_a_read_only_place(folder, lambda: Store(folder / "s.db").find())
    assert said.startswith("StoreError") and "copy it" in said


# Objects of a client's library (22)


class Message:
    "As pydantic models of a client."
    def __init__(self, **fields): self.__dict__.update(fields)
    def model_dump(self, **_): return dict(self.__dict__)


def test_objects_of_a_client_are_messages(store):
    made = episode_of([user("Hi"), Message(role="assistant", content="ok", tool_calls=None)])
    assert made == episode_of([user("Hi"), agent("ok")])
    call = Message(id="1", type="function", function=Message(name="f", arguments='{"a": 1}'))
    inside = episode_of([user("Hi"), agent(None, tool_calls=[call]),
                         {"role": "tool", "tool_call_id": "1", "content": "2"}])
    assert inside.actions == ('f({"a": 1})',) and inside.observations == ("", "2")
    memory = memory_of(store)
    assert memory.augment([user("Hi"), Message(role="assistant", content="ok")]) == [
        user("Hi"), agent("ok")]
    for wrong, kind in (("Hi", "str"), (7, "int"), ({"content": "x"}, "dict"), (Message(x=1), "dict")):
        with pytest.raises(TrajectoryError, match=f"message 2 is a {kind} without a role"):
            as_messages([user("Hi"), wrong])


def test_real_objects_of_openai_are_messages():
    chat = pytest.importorskip("openai", reason="the extra `server` is not installed").types.chat
    made = chat.ChatCompletionMessage.model_validate({"role": "assistant", "content": None, "tool_calls": [
        {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]})
    assert as_messages([made]) == [agent(None, tool_calls=[
        {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}])]
    assert episode_of([user("Hi"), made]).actions == ("f({})",)


def test_calls_of_other_shapes_are_written_out():
    assert call_text([{"custom": {"name": "sql", "input": "SELECT\n 1"}}, {"name": "f", "arguments": {"a": "é"}},
                      {"function": {"name": "g", "arguments": None}}]) == 'sql(SELECT 1); f({"a": "é"}); g({})'


# Pictures and other parts (23)


def test_a_picture_is_passed_on_and_noted(store):
    memory, asked = memory_of(store), conversation("picture.json")
    kept = memory.record([*asked, agent("A train to Lyon.")], True)
    assert kept.goal == "What is on this ticket?" and kept.provenance["left_out"] == {"image_url": 1}
    assert "data:x" not in json.dumps(kept.to_dict())
    again = memory.augment(asked)
    assert again[1] == asked[0], "the picture goes to the model as it was"
    assert "A train to Lyon." in again[0]["content"] and asked == conversation("picture.json")


def test_parts_of_every_kind():
    parts = [{"type": "input_audio", "input_audio": {}}, {"type": "refusal", "refusal": "No."},
             {"type": "output_text", "text": "But"}, "plain", {"type": "file", "text": 7}, 7]
    made = episode_of([user("Hi"), agent(parts), user([{"type": "image_url"}, {"type": "image_url"}])])
    assert made.actions == ("No.\n\nBut\n\nplain",) and made.observations[1] == "[image_url] [image_url]"
    assert made.provenance["left_out"] == {"file": 1, "image_url": 2, "input_audio": 1, "int": 1}
    only = episode_of([user([{"type": "image_url", "image_url": {"url": "x"}}]), agent("A cat.")])
    assert only.goal == "[image_url]"


# The same conversation with another outcome; system texts with a clock


def test_the_last_verdict_of_its_author_stands(store):
    memory = memory_of(store)
    first = memory.record(ASK + DONE, True)
    assert memory.recall(ASK).ids == (first.id,)
    assert memory.record(ASK + DONE, False) is None and store.get(first.id).success is False
    assert memory.recall(ASK).ids == (), "it is no success any more"
    last = memory.record(ASK + DONE, True, score=0.5)
    assert store.get(first.id) == last and (last.success, last.score) == (True, 0.5)
    assert last.provenance["outcomes"] == (True, False, True) and len(store) == 1 and check(store.path).ok
    assert memory.record(ASK + DONE, None, failures=True).id == first.id
    assert store.get(first.id).success is True, "not knowing changes nothing"


def test_another_author_or_namespace_does_not_overwrite_a_verdict(store):
    red, eve = memory_of(store, namespace="red"), memory_of(store, author="eve", namespace="red")
    id = red.record(ASK + DONE, True).id
    assert eve.record(ASK + DONE, False, failures=True).success is True
    blue = red.within("blue").record(ASK + DONE, False, failures=True)
    assert blue.success is False and blue.id != id, "blue learns nothing of red's verdict"
    assert store.get(id).success is True and red.recall(ASK).ids == (id,)


def test_a_clock_in_the_system_text_changes_nothing(store):
    memory = memory_of(store)
    memory.record(ASK + DONE, True)
    def at(time, *more): return [{"role": "system", "content": f"It is {time}."}, user("Turn on the fan."), *more]
    first = memory.augment(at("10:00"))
    later = memory.augment(at("10:01", agent("look")))
    block = first[0]["content"].removeprefix("It is 10:00.")
    assert OPENS in block and later[0]["content"] == "It is 10:01." + block
    assert later.receipt.id == first.receipt.id
    a, b = (memory.record(at(t, agent("look")), True) for t in ("10:02", "10:03"))
    assert a.id == b.id and len(store) == 2


# Import and chat memory (01, 13)


def test_an_imported_conversation_is_the_episode_that_a_recorded_one_is(store, tmp_path):
    record = json.loads((CASES / "tool_calls.jsonl").read_text(encoding="utf-8"))
    memory = memory_of(store)
    imported = list(read_log(CASES / "tool_calls.jsonl", options=Options(success="ok", author="me")))
    adopted, = memory.adopt(imported)
    assert adopted.id == imported[0].id and adopted.task == imported[0].task
    with Store(tmp_path / "other.db") as other:
        live = memory_of(other).record(record["messages"], True)
    assert adopted.id == live.id and (adopted.task, adopted.goal) == (live.task, live.goal)
    assert adopted.steps == live.steps and adopted.actions[0] == 'find_parcel({"number": 7})'
    assert (adopted.success, adopted.score) == (live.success, live.score) == (True, 1.0)
    assert memory.adopt(imported)[0].id == live.id and len(store) == 1
    block = memory.augment([user("Where is parcel 9?")])[0]["content"]
    assert '> find_parcel({"number": 7}) | depot B' in block


def test_what_cannot_be_recalled_says_why(store):
    store.add_many(read_log(CASES / "tool_calls.jsonl", options=Options(success="ok", world="desk")))
    memory = memory_of(store)
    with pytest.warns(UserWarning, match=r"no episode is of world 'chat'; there are \['desk'\].*adopt"):
        assert not len(memory.recall([user("Where is parcel 9?")]))
    with pytest.warns(UserWarning, match=r"by an unknown author, and 'me' trusts none of them"):
        assert not len(memory_of(store, world="desk").recall([user("Where is parcel 9?")]))
    with warnings.catch_warnings():  # what others have is not said
        warnings.simplefilter("error")
        assert len(memory_of(store, namespace="red").recall([user("Where is parcel 9?")])) == 0
    open_to_all = memory_of(store, world="desk", trust=Trust(unknown="trusted"))
    assert len(open_to_all.recall([user("Where is parcel 9?")])) == 1


# The command's own words (37)


def test_a_hint_names_the_options_of_the_command(tmp_path, capsys):
    main(["import", str(CASES / "latin1.jsonl"), "--store", str(tmp_path / "s.db")])
    said = capsys.readouterr()
    assert "encodings=" not in said.out + said.err and "--encoding utf-8,cp1252" in said.err
    assert in_options("raise the limit (limit=268435456)") == "raise the limit (--limit 256)"
    assert in_options("encodings=('utf-8', 'cp1252') tries") == "--encoding utf-8,cp1252 tries"


# Receipts


def asked(memory, text, *more, **about): return memory.augment([user(text), *more], **about)


def test_a_receipt_is_settled_from_another_process(store):
    memory = memory_of(store)
    id = memory.record(ASK + DONE, True).id
    by_name, by_id = asked(memory, "Turn on the fan.", conversation="c 1"), asked(memory, "Turn it on.")
    assert by_name.receipt.ids == by_id.receipt.ids == (id,) and by_name.receipt.conversation == "c 1"
    elsewhere = in_another_process(store.path, f"""
memory.record({[user("Turn on the fan."), agent("x")]!r}, True, receipt="c 1")
memory.record({[user("Turn it on."), agent("y")]!r}, False, receipt={by_id.receipt.id!r})""")
    assert elsewhere == "" and uses(store, id) == (2, 1.0)
    memory.settle("c 1", True)
    assert uses(store, id) == (2, 1.0), "the same verdict again is no second use"
    memory.settle(by_id.receipt, True)
    assert uses(store, id) == (2, 2.0), "a second verdict corrects the first"
    memory.settle("c 1", None)
    assert uses(store, id) == (2, 2.0)


def in_another_process(path, code):
    import subprocess
    begin = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
from encoders import Letters
from exprag.memory.chat_memory import ChatMemory
from exprag.store import Store
memory = ChatMemory(Store({str(path)!r}), Letters(), "me")
"""
    done = subprocess.run([sys.executable, "-c", begin + code], capture_output=True, text=True)
    return done.stderr


def test_the_block_of_a_conversation_is_pinned(store):
    memory = memory_of(store)
    memory.record(ASK + DONE, True)
    first = asked(memory, "Turn on the fan.")
    named = asked(memory, "Turn on the fan.", conversation="c")
    memory.record([user("Turn on the fan!"), agent("pull")], True)
    for more in ((agent("a"),), (agent("a"), user("no"), agent("b"))):
        assert asked(memory, "Turn on the fan.", *more)[0] == first[0]
    assert asked(memory, "Turn on the fan.", conversation="c")[0] == named[0]
    fresh = asked(memory, "Turn on the fan.", conversation="d")
    assert "> pull" in fresh[0]["content"] and "> pull" not in first[0]["content"]
    memory.record([user("Turn on the fan."), agent("a")], False, receipt="c")
    assert "> pull" in asked(memory, "Turn on the fan.", conversation="c")[0]["content"], "a new one"


def test_a_rule_refreshes_the_block_and_the_credit_goes_to_all_that_was_read(store):
    memory = memory_of(store, when=Every(2))
    old = memory.record(ASK + DONE, True).id
    talk = [user("Turn on the fan.")]
    first = memory.augment(talk, "c")
    new = memory.record([user("Turn on the fan!"), agent("pull")], True).id
    talk += [agent("a"), user("no")]
    assert memory.augment(talk, "c")[0] == first[0]
    talk += [agent("b"), user("no")]
    second = memory.augment(talk, "c")
    assert "> pull" in second[0]["content"] and second.receipt.id == first.receipt.id
    assert set(memory.receipt("c").ids) == {old, new}
    memory.record([*talk, agent("c")], True, receipt="c")
    assert uses(store, old) == uses(store, new) == (1, 1.0)


def test_what_is_erased_is_in_no_receipt(store, tmp_path):
    memory = memory_of(store)
    secret = memory.record([user("Turn on the xylquarzine."), agent("press")], True).id
    kept = memory.record(ASK + DONE, True).id
    assert "xylquarzine" in asked(memory, "Turn on the fan.", conversation="c")[0]["content"]
    memory.forget([secret])
    assert memory.receipt("c").block is None and memory.receipt("c").ids == (kept,)
    assert not any(b"xylquarzine" in p.read_bytes() for p in tmp_path.iterdir())
    assert "press switch" in asked(memory, "Turn on the fan.", conversation="c")[0]["content"]
    assert check(store.path).ok


def test_receipts_stay_in_their_namespace(store):
    red = memory_of(store, namespace="red")
    blue, other = red.within("blue"), memory_of(store, author="eve", namespace="red")
    id = red.record(ASK + DONE, True).id
    mine = asked(red, "Turn on the fan.", conversation="c").receipt
    assert len(blue.recall(ASK)) == 0 and asked(blue, "Turn on the fan.", conversation="c") == [
        user("Turn on the fan.")]
    for stranger in (blue, other):
        for of in (mine, mine.id, "", "nobody", Receipt("0" * 32, "", ())):
            with pytest.raises(StoreError, match="has no receipt .*augment"): stranger.settle(of, True)
    blue.record([user("Turn on the fan."), agent("x")], True, receipt="c")
    assert uses(store, id) == (0, 0.0)
    with pytest.raises(StoreError, match="has no receipt"): red.record(ASK + DONE, True, receipt="d")
    assert red.settle("c", True).ids == (id,) and uses(store, id) == (1, 1.0)


def test_a_store_of_an_earlier_version_answers_as_before(tmp_path):
    data = Path(__file__).parent / "data"
    (tmp_path / "s.db").write_bytes((data / "store-v2.sqlite").read_bytes())
    with Store(tmp_path / "s.db") as store:
        before, vectors = [t.to_dict() for t in store], store.rows("SELECT * FROM vectors ORDER BY id")
        memory = memory_of(store)
        with pytest.warns(UserWarning): memory.augment(ASK)
        assert [t.to_dict() for t in store] == before
        assert set(vectors) <= set(store.rows("SELECT * FROM vectors")) and check(store.path).ok


# Many conversations at once


@pytest.mark.parametrize("named", [True, False])
def test_sixteen_conversations_at_once(store, named):
    """Each gets its own block at every turn, each receipt is settled once, and the loop keeps turning."""
    memory = memory_of(store)
    shown = memory.record(ASK + DONE, True).id
    beats = []
    async def talk(n):
        name, messages = f"c {n}" if named else "", [user(f"Turn on the fan {chr(97 + n) * 3}.")]
        first = await memory.augment_async(messages, name)
        for turn in range(3):
            messages += [agent(f"try {turn}"), user("no")]
            again = await memory.augment_async(messages, name)
            assert (again[0], again.receipt.id) == (first[0], first.receipt.id)
        kept = await memory.record_async([*messages, agent(f"done {n}")], n % 2 == 0,
                                         failures=True, receipt=name or None)
        return kept.id, first.receipt.ids
    async def beat():
        while True:
            beats.append(time.monotonic())
            await asyncio.sleep(0.005)
    async def all_of_them():
        heart = asyncio.create_task(beat())
        found = await asyncio.gather(*map(talk, range(16)))
        heart.cancel()
        return found
    found = asyncio.run(all_of_them())
    assert len({id for id, _ in found}) == 16 and len(store) == 17 and check(store.path).ok
    read = Counter(id for _, ids in found for id in ids)
    assert read[shown] >= 1 and {id: u.uses for id, u in usage(store).items()} == read
    gaps = [b - a for a, b in zip(beats, beats[1:])]
    assert len(gaps) > 10 and sorted(gaps)[len(gaps) // 2] < 0.25, "the loop was not blocked"


def test_a_slow_memory_does_not_block_the_loop(store):
    class Slow(Letters):
        def encode(self, texts, role="document"):
            time.sleep(0.3)
            return super().encode(texts, role)
    memory = ChatMemory(store, Slow(), "me")
    memory.record(ASK + DONE, True)
    async def watch():
        asking, longest = asyncio.create_task(memory.augment_async(ASK)), 0.0
        while not asking.done():
            before = time.monotonic()
            await asyncio.sleep(0)
            longest = max(longest, time.monotonic() - before)
        return longest, await asking
    longest, messages = asyncio.run(watch())
    assert longest < 0.25 and OPENS in messages[0]["content"]


def test_namespaces_hold_while_many_threads_ask_one_retriever(store):
    red = memory_of(store, namespace="red")
    spaces = {name: red.within(name) for name in ("red", "blue", "green")}
    ids = {name: m.record([user(f"Turn on the {name} lamp."), agent(name)], True).id
           for name, m in spaces.items()}
    wrong = []
    def ask(name):
        for _ in range(30):
            found = spaces[name].recall([user("Turn on the lamp.")]).ids
            if found != (ids[name],): wrong.append((name, found))
    threads = [threading.Thread(target=ask, args=(name,)) for name in spaces for _ in range(3)]
    for t in threads: t.start()
    for t in threads: t.join()
    assert not wrong


def test_a_retriever_takes_in_what_is_new_and_answers_as_one_made_anew(store):
    encoded = []
    class Counting(Letters):
        def encode(self, texts, role="document"):
            encoded.extend(texts)
            return super().encode(texts, role)
    def episode(n): return Trajectory(Task("w", "t", str(n), "train"), f"goal {'abc'[n % 3] * n}", "")
    some = [episode(n) for n in range(12)]
    store.add_many(some[:6])
    retriever, asked = Retriever(store, Counting()), episode(20)
    index = (retriever.search(asked), retriever.fresh())[1]
    encoded.clear()
    for t in some[6:]:
        store.add(t)
        for n in (1, 3, 30): assert retriever.search(asked, n) == Retriever(store, Letters()).search(asked, n)
    assert retriever.fresh() is index and encoded == [t.goal for t in some[6:]], "each once"
    encoded.clear()
    store.add(episode(13))
    retriever.search(asked)
    assert encoded == [episode(13).goal], "only what is new is encoded"
    store.delete(some[3].id)
    assert retriever.search(asked, 30) == Retriever(store, Letters()).search(asked, 30)
    assert len(retriever) == 12 and retriever.fresh() is not index
    narrow = Retriever(store, Letters()).index([some[0].id, some[1].id])
    store.add(episode(14))
    assert {h.id for h in narrow.search(asked, 30)} == {some[0].id, some[1].id}


class Chain:
    "As LangChain's messages: a type, and no role."
    def __init__(self, type, content, **more): self.fields = {"type": type, "content": content, "additional_kwargs": {}, "id": None, **more}
    def model_dump(self): return self.fields


CHAIN = [Chain("system", "Be brief."), Chain("human", "Where is parcel 7?"), Chain("ai", "", tool_calls=[{"name": "find", "args": {"n": 7}, "id": "c1", "type": "tool_call"}]),
         Chain("tool", "depot B", tool_call_id="c1", name="find"), Chain("ai", "In depot B.", tool_calls=[])]


def test_messages_of_langchain_are_the_same_conversation(store):
    memory = ChatMemory(store, Letters(), "me")
    kept = memory.record(CHAIN, True)
    call = {"id": "c1", "type": "function", "function": {"name": "find", "arguments": '{"n": 7}'}}
    usual = [{"role": "system", "content": "Be brief."}, user("Where is parcel 7?"), agent("", tool_calls=[call]),
             {"role": "tool", "tool_call_id": "c1", "name": "find", "content": "depot B"}, agent("In depot B.")]
    assert kept.id == episode_of(usual).id and as_messages(CHAIN) == usual
    assert OPENS in memory.augment([Chain("human", "Where is parcel 8?")])[0]["content"]
    picture = [{"type": "text", "text": "See"}, {"type": "image_url", "image_url": {"url": "x"}}]
    assert as_messages([Chain("human", picture)]) == [{"role": "user", "content": picture}]
    with pytest.raises(TrajectoryError, match="without a role"): as_messages([Chain("remove", "")])


def test_messages_of_the_real_langchain(store):
    core = pytest.importorskip("langchain_core.messages", reason="needs LangChain: pip install langchain-core")
    call = {"name": "find", "args": {"n": 7}, "id": "c1"}
    asked = [core.HumanMessage("Where is parcel 7?"), core.AIMessage("", tool_calls=[call]), core.ToolMessage("depot B", tool_call_id="c1"), core.AIMessage("In depot B.")]
    made = as_messages(asked)
    assert episode_of(asked).actions == ('find({"n": 7})', "In depot B.")
    back = core.convert_to_messages(made)
    assert [type(m) for m in back] == [type(m) for m in asked] and back[1].tool_calls[0]["args"] == {"n": 7}


def test_an_author_can_be_added_to_what_was_imported_without_one(tmp_path, store):
    log = tmp_path / "log.jsonl"
    log.write_text(json.dumps({"messages": [*ASK, *DONE], "ok": True}) + "\n")
    command = ["import", str(log), "--store", str(store.path), "--success", "ok"]
    memory = ChatMemory(store, Letters(), "me")
    assert main(command) == 0
    with pytest.warns(UserWarning, match="by an unknown author, and 'me' trusts none"): assert len(memory.recall(ASK)) == 0
    assert main([*command, "--author", "me"]) == 0 and len(memory.recall(ASK)) == 1
    assert main([*command, "--author", "you"]) == 0  # the first one stays
    found, = store.find()
    assert store.get(found).provenance["author"] == "me" and store.find(authors=["me"]) == [found]


@pytest.mark.parametrize("how", ["adopt", "record"])
def test_what_has_no_author_becomes_that_of_who_records_it(store, how):
    store.add(replace(episode_of([*ASK, *DONE]), success=False, score=0.0))
    memory = ChatMemory(store, Letters(), "me")
    if how == "record": memory.record([*ASK, *DONE], True)
    else: memory.adopt([replace(episode_of([*ASK, *DONE]), success=True)])
    kept = store.get(store.find()[0])
    assert kept.provenance["author"] == "me" and kept.success is True and len(memory.recall(ASK)) == 1


def test_unknown_outcomes_are_said_to_be_the_reason(store):
    memory = ChatMemory(store, Letters(), "me")
    memory.adopt([episode_of([*ASK, *DONE])])
    with pytest.warns(UserWarning, match="nobody has said how the nearest episodes ended.*--success"): assert len(memory.recall(ASK)) == 0
    memory.record([*ASK, *DONE], False)
    with warnings.catch_warnings(): warnings.simplefilter("error"); ChatMemory(store, Letters(), "me").recall(ASK)  # a failure is no fault
