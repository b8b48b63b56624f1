"""Packaging, from settings.ini: that file is what to edit."""
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
EXTRA = "_requirements"  # `dev_requirements` in settings.ini is the extra `dev`

parser = ConfigParser(delimiters=["="])
parser.read(ROOT / "settings.ini", encoding="utf-8")
settings = parser["DEFAULT"]

setup(
    name=settings["lib_name"],
    version=settings["version"],
    description=settings["description"],
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author=settings["author"],
    keywords=settings["keywords"].split(),
    license="Apache-2.0",
    license_files=["LICENSE"],
    packages=find_packages(include=["exprag", "exprag.*"]),
    package_data={"exprag": ["assets/**/*"]},
    python_requires=">=" + settings["min_python"],
    install_requires=settings["requirements"].split(),
    extras_require={name.removesuffix(EXTRA): value.split() for name, value in settings.items() if name.endswith(EXTRA)},
    entry_points={"console_scripts": settings["console_scripts"].split(), "nbdev": ["exprag=exprag._modidx:d"]},
    zip_safe=False,
)
