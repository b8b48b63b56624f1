"""The house: the rules of the book hold, importing is light, and what pip installs is what the README promises."""
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from _book.checking import RULES
from _book.notebooks import Book

ROOT = Path(__file__).resolve().parents[1]
HEAVY = ["torch", "transformers", "faiss", "peft", "sentence_transformers", "datasets", "py4j", "scienceworld", "matplotlib", "pyarrow", "textworld", "alfworld", "openai", "fastapi", "psycopg", "ray"]
SECONDS = 0.5
MODULES = sorted(
    "exprag." + ".".join(path.relative_to(ROOT / "exprag").with_suffix("").parts)
    for path in (ROOT / "exprag").rglob("*.py")
    if not path.name.startswith("_")
)

IMPORT = """
import json, sys, time
sys.path.insert(0, {path!r})
start = time.process_time()
import {module}
seconds = time.process_time() - start
print(json.dumps([seconds, [name for name in {heavy!r} if name in sys.modules], {module}.__file__]))
"""


def imported(module: str, path: str = str(ROOT)) -> tuple[float, list[str], str]:
    """Import a module in a fresh interpreter: CPU seconds, the heavy libraries it drew in, where it came from."""
    code = IMPORT.format(module=module, heavy=HEAVY, path=path)
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, f"import {module} fails:\n{done.stderr}"
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("rule", RULES.values(), ids=list(RULES))
def test_rule_holds(book, rule):
    problems = rule(book)
    assert not problems, f"{rule.__doc__}\n" + "\n".join(problems)


@pytest.mark.parametrize("module", ["exprag", *MODULES])
def test_import_is_light(module):
    """Under half a second (the best of three, since the first one compiles), and nothing heavy."""
    runs = [imported(module) for _ in range(3)]
    assert runs[0][1] == [], f"import {module} draws in {runs[0][1]}: import them where they are used"
    assert min(seconds for seconds, _, _ in runs) < SECONDS


class TestReadme:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    commands = [line for line in readme.splitlines() if line.startswith("python3 -m venv")]

    def test_has_two_commands_and_no_third(self):
        demo, tests = self.commands
        assert demo.endswith("exprag demo") and tests.endswith("-m pytest")

    def test_names_an_extra_and_a_command_that_exist(self):
        settings = Book.find(ROOT).settings
        script, _, target = settings["console_scripts"].partition("=")
        assert script == "exprag"
        for extra in re.findall(r"\.\[(\w+)\]", self.readme):
            assert settings[f"{extra}_requirements"]
        module, _, function = target.partition(":")
        code = f"from {module} import {function}; assert callable({function})"
        subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)

    def test_links_lead_somewhere(self):
        targets = re.findall(r"\]\(([^)#\s]+)", self.readme)
        assert [t for t in targets if "://" not in t and not (ROOT / t).exists()] == []


def test_torch_is_held_back():
    """2.13.0 is the newest for which a plain `pip install` gets no CUDA."""
    from packaging.requirements import Requirement

    requirements = map(Requirement, Book.find(ROOT).settings["requirements"].split())
    torch = next(requirement for requirement in requirements if requirement.name == "torch").specifier
    assert [v for v in ("2.10.0", "2.11.0", "2.13.0", "2.13.0+cpu", "2.13.1", "2.14.0") if v in torch] == [
        "2.11.0", "2.13.0", "2.13.0+cpu"]


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """What a wheel is built from, copied so that building leaves nothing in the checkout."""
    source = tmp_path_factory.mktemp("source")
    for name in ("settings.ini", "setup.py", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "exprag", source / "exprag", ignore=shutil.ignore_patterns("__pycache__"))
    return source


@pytest.fixture(scope="module")
def installed(source, tmp_path_factory) -> Path:
    """The package as pip installs it from a wheel, in a folder of its own."""
    target = tmp_path_factory.mktemp("installed")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    for command in (["wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", str(source / "dist"), str(source)],
                    ["install", "--no-deps", "--no-index", "--target", str(target), "--find-links", str(source / "dist"),
                     "exprag"]):
        done = subprocess.run(pip + command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    return target


class TestInstalledPackage:
    def test_imports_from_outside_the_checkout(self, installed, tmp_path):
        code = f"import sys; sys.path.insert(0, {str(installed)!r}); import exprag; print(exprag.__version__, exprag.__file__)"
        done = subprocess.run([sys.executable, "-I", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
        version, file = done.stdout.split(maxsplit=1)
        assert version == Book.find(ROOT).settings["version"]
        assert Path(file.strip()).is_relative_to(installed)

    def test_every_module_imports(self, installed):
        for module in MODULES:
            assert Path(imported(module, str(installed))[2]).is_relative_to(installed)

    def test_carries_the_package_whole(self, source, installed):
        """Modules and assets, byte for byte."""
        files = [path for path in (source / "exprag").rglob("*") if path.is_file()]
        assert files
        for path in files:
            copy = installed / path.relative_to(source)
            assert copy.is_file(), f"{path.relative_to(source)} is not in the wheel: see package_data in setup.py"
            assert copy.read_bytes() == path.read_bytes()

    def test_carries_nothing_else(self, installed):
        tops = {path.name for path in installed.iterdir()} - {"bin"}
        assert {name for name in tops if not name.endswith(".dist-info")} == {"exprag"}
        assert (installed / "bin" / "exprag").is_file()

    def test_says_what_it_needs(self, installed):
        metadata = next(installed.glob("*.dist-info/METADATA")).read_text(encoding="utf-8")
        assert "\nProvides-Extra: dev\n" in metadata and re.search(r"\nLicense(-Expression)?: Apache-2.0\n", metadata)
        needed = [line for line in metadata.splitlines() if line.startswith("Requires-Dist") and "extra ==" not in line]
        assert not [line for line in needed if re.search(r"nbdev|pytest|sphinx|jupyter", line)]


def test_ci_runs_the_command_of_the_readme():
    """.ci/run takes its test command from the README, so the two cannot drift apart."""
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    done = subprocess.run([str(script), "--print"], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == TestReadme.commands[1]
