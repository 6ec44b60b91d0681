"""The report of a run: PNG plots and one HTML page that holds everything, for a browser offline.

What it is: a view of a run directory, made from what runlog's RunReader returns. What it is not:
an analysis; the notebooks go further. plots.py is the only module that imports matplotlib.
"""

from __future__ import annotations

from pathlib import Path

from jaxrl_llm.report.page import Decode, page
from jaxrl_llm.report.plots import draw
from jaxrl_llm.runlog import RunReader


def write_report(run_dir: Path, *, decode: Decode | None = None) -> Path:
    """Writes RUN/report/index.html and the PNG files beside it.

    Args:
      run_dir: a run directory, finished or still running.
      decode: token ids -> text, to show the single tokens of sampled responses. Without it a
        response is shown by characters where it has one for every token, and by ids elsewhere.

    Returns:
      The path of the page. It embeds the plots, so it can be moved alone.

    Raises:
      ValueError: the directory has no run log.
    """
    reader = RunReader(run_dir)
    folder = Path(run_dir) / "report"
    folder.mkdir(exist_ok=True)
    plots = draw(reader, folder)
    path = folder / "index.html"
    text = page(Path(run_dir).resolve().name, reader, plots, decode)
    path.write_text(text, encoding="utf-8")
    return path
