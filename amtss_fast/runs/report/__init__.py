"""The report of a run: one HTML page, and a table for the terminal.

`read` reads and checks the files of a run folder, `table` makes the table, `student_pictures` and `teacher_pictures`
draw the pictures, which `svg` makes part of the page, and `page` puts all of it into `page.html.j2` and `styles.css`.
"""

from pathlib import Path

from amtss_fast._system.files import write_atomically
from amtss_fast.runs.report.page import render_page
from amtss_fast.runs.report.read import RunRecord, read_log, read_metrics, read_run
from amtss_fast.runs.report.table import format_table

__all__ = ["RunRecord", "format_table", "read_log", "read_metrics", "read_run", "write_report"]


def write_report(run_dir: str | Path) -> Path:
    """Writes report.html into a run folder and returns its path.

    The page shows what the folder has: losses and accuracy over the steps, accuracy per language, teacher weights and
    margins, settings, versions and times. It is written in one step.

    Raises:
        FileNotFoundError: no metrics.json.
        UserError: a broken file; the message names it and says what is wrong.
    """
    record = read_run(run_dir)
    page = render_page(record)
    path = record.path / "report.html"
    write_atomically(path, page)
    return path
