"""The book tool: runs, exports, checks and renders the chapters in `nbs/`. Start it with `python nbs/_book/book.py`."""
