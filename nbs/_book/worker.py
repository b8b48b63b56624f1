"""One chapter, run in this process. Started by running.py with the cells in a file; never imported.

    python -P worker.py CELLS.json RESULTS.jsonl

Each cell's outputs are written down as soon as it is done, so that a process that dies is still known to have died there.
"""
import json
import sys
import traceback


def shorten(error: BaseException) -> str:
    """The traceback from the cell onwards, without the frames of IPython and execnb before it."""
    frames = error.__traceback__
    while frames and any(part in frames.tb_frame.f_code.co_filename for part in ("IPython", "execnb", "worker.py")):
        frames = frames.tb_next
    return "".join(traceback.format_exception(type(error), error, frames))


def new_shell():
    """A shell that shows figures as SVG with fixed ids and no date, so that the same picture is the same text."""
    from execnb.shell import CaptureShell

    shell = CaptureShell(mpl_format="svg")
    shell.showtraceback = shell.showsyntaxerror = lambda *args, **kwargs: None  # errors are reported, not printed
    shell.run(
        "import matplotlib, matplotlib_inline.backend_inline\n"
        "matplotlib.rcParams.update({'svg.hashsalt': 'book', 'figure.figsize': (6.4, 3.6)})\n"
        "matplotlib_inline.backend_inline.set_matplotlib_formats(\n"
        "    'svg', metadata=dict.fromkeys(('Creator', 'Date', 'Format', 'Type')))\n"
        "del matplotlib, matplotlib_inline"
    )
    return shell


def main(cells_path: str, results_path: str) -> int:
    with open(cells_path, encoding="utf-8") as file:
        cells = json.load(file)
    with open(results_path, "w", encoding="utf-8", buffering=1) as results:
        shell = new_shell()
        for cell in cells:
            print(json.dumps({"started": cell["index"]}), file=results)
            outputs = shell.run(cell["source"])
            if shell.exc:
                printed = "".join("".join(out["text"]) for out in outputs if out["output_type"] == "stream")
                failed = {"failed": cell["index"], "traceback": shorten(shell.exc), "printed": printed}
                print(json.dumps(failed), file=results)
                return 1
            print(json.dumps({"done": cell["index"], "outputs": outputs}, default=str), file=results)
        print(json.dumps({"finished": True}), file=results)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
