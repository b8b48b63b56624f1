"""Sphinx's settings for the site. Sphinx is started by rendering.py, which writes the pages first."""
import os
from pathlib import Path

from _book.notebooks import Book
from _book.rendering import page_name, symbols

book = Book(Path(os.environ["BOOK_ROOT"]))
settings = book.settings

project = settings["title"]
author = settings["author"]
copyright = settings["copyright"]
version = release = settings["version"]
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.linkcode", "sphinx.ext.mathjax", "sphinx_copybutton",
              "_book.sphinx_ext"]

nb_execution_mode = "off"  # outputs are the saved ones
nb_code_prompt_show = nb_code_prompt_hide = "imports"  # what is folded
nb_render_markdown_format = "gfm"  # tables in Markdown outputs
myst_enable_extensions = ["amsmath", "deflist", "dollarmath", "fieldlist"]
myst_heading_anchors = 4
myst_dmath_allow_digits = False  # "$5 and $6" are prices

autodoc_typehints = "none"  # types stand in the parameter tables
autodoc_preserve_defaults = True
autodoc_class_signature = "mixed"
python_use_unqualified_type_names = True
add_module_names = False
toc_object_entries_show_parents = "hide"

html_theme = "furo"
html_title = f"{project} {version}"
html_static_path = ["static"]
html_css_files = ["book.css"]
html_copy_source = html_show_sourcelink = False
html_show_sphinx = False
html_show_search_summary = False  # summaries are fetched page by page, which browsers forbid from file://
html_permalinks_icon = "#"
pygments_style, pygments_dark_style = "friendly", "monokai"
copybutton_exclude = ".linenos, .gp, .go"

mathjax_path = "mathjax-3.2.2-tex-svg.js"  # vendored: the site needs no network
mathjax3_config = {"options": {"enableMenu": False}, "svg": {"fontCache": "global"}}

pages = {
    f"{book.library}.{chapter.module}.{name}": page_name(chapter.name)
    for chapter in book.chapters() for cell in chapter.cells for name in symbols(cell)
}


def linkcode_resolve(domain: str, info: dict) -> str | None:
    """The definition in its chapter, for the `[source]` links of the API pages (which lie one folder down)."""
    name = f"{info['module']}.{info['fullname']}"
    if name not in pages:  # a field: its class is where to look
        name = name.rpartition(".")[0]
    up = "../" * (pages[name].count("/") + 1) if name in pages else ""  # api pages lie in folders as the chapters do
    return f"{up}{pages[name]}.html#{name}" if name in pages else None
