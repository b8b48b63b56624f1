"""Pictures of the viewer's pages for its chapter: python nbs/data/view.py, with playwright and chromium at hand.

The store has the experts of experience.jsonl.xz and attempts that end halfway, each with what its memory showed."""
import json
import lzma
import os
import shutil
import tempfile
import threading
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import uvicorn
from PIL import Image
from playwright.sync_api import sync_playwright

from exprag.memory.hybrid import WordRetriever
from exprag.memory.utility import credit
from exprag.select import Memory
from exprag.store import Store
from exprag.trajectory import Trajectory
from exprag.view.viewer import Guard, Place, Viewer, application

HERE = Path(__file__).parent
PORT, TOKEN = 8473, "token"


def fill(path: Path) -> str:
    """Make the store; the id of an attempt."""
    lines = lzma.decompress((HERE / "experience.jsonl.xz").read_bytes()).splitlines()
    experts = [Trajectory.from_dict(json.loads(line)) for line in lines]
    with Store(path) as store:
        store.add_many(experts, namespace="experts")
        memory = Memory(WordRetriever(store), pool=8)
        for t in experts[::9]:
            now = replace(t.opening(), task=replace(t.task, variation=f"{t.task.variation}1", fold="dev"))
            shown = memory.recall(now).ids
            about = {"actor": "small model", "memory": memory.describe(), "retrieved": list(shown), "stop": "cap",
                     "tokens": {"prompt": 61 * len(t), "generated": 9 * len(t)}}
            half = replace(now, steps=t.steps[:len(t) // 2], score=10.0, success=False, provenance=about)
            store.add(half)
            credit(store, shown, 0.0)
        return half.id


def picture(page, name: str) -> None:
    """What the page shows, in few colours and so in few bytes."""
    image = Image.open(BytesIO(page.screenshot())).convert("RGB")
    image.quantize(48, dither=Image.Dither.NONE).save(HERE / f"view_{name}.png", optimize=True)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "science.db")
        id = fill(path)
        app = Guard(application(Viewer(Place.open(path))), TOKEN, PORT)
        server = uvicorn.Server(uvicorn.Config(app, port=PORT, log_level="warning", lifespan="off"))
        thread = threading.Thread(target=server.run)
        thread.start()
        with sync_playwright() as play:
            chrome = play.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
            for scheme, width, at, name in (
                    ("light", 1000, "episodes?outcome=failure", "list"), ("dark", 1000, f"episode/{id}", "episode"),
                    ("light", 1000, f"episode/{id}/why?at=0", "why"), ("dark", 390, "episodes?q=thermometer", "narrow")):
                page = chrome.new_page(color_scheme=scheme, viewport={"width": width, "height": 700})
                page.goto(f"http://127.0.0.1:{PORT}/?token={TOKEN}")
                page.goto(f"http://127.0.0.1:{PORT}/{at}")
                picture(page, name)
            chrome.close()
        server.should_exit = True
        thread.join()


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
