"""The command that makes pictures for print of a report's figures."""

import argparse
from pathlib import Path

from probe.cli.command import Command
from probe.cli.progress import progress
from probe.errors import ProbeError, unknown_name

LEGIBLE = 5.5  # points


def _add_figures(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("report", metavar="FOLDER", help="a folder with a report.html in it, or such a file")
    parser.add_argument("--to", metavar="FOLDER", help="where they go (default: figures, beside the report)")
    parser.add_argument("--only", metavar="NAMES", help="some of them by name, with commas (default: all)")
    parser.add_argument("--formats", default="png,svg,pdf", help="with commas; HTML always (default: %(default)s)")
    width = "in print (default: %(default)s, two columns; one is 84)"
    parser.add_argument("--width", type=float, default=174, metavar="MM", help=width)
    parser.add_argument("--dpi", type=int, default=300, help="of PNGs (default: %(default)s)")


def _figures(options: argparse.Namespace) -> int:
    from probe.files import write_bytes, write_text
    from probe.report.export import check_pictures, figures_of, pictures, print_size, read_page, standalone
    from probe.runs import check_output

    page = Path(options.report)
    page = page / "report.html" if page.is_dir() else page
    if not page.exists():
        raise ProbeError(f"{page}: no such file; probe figures needs a report, as `probe study` and others write it")
    figures = figures_of(read_page(page))
    if options.only:
        names = _listed(options.only)
        if unknown := [name for name in names if name not in figures]:
            raise unknown_name("figure", unknown[0], figures)
        figures = {name: figures[name] for name in names}
    folder, formats = page.parent / "figures" if options.to is None else Path(options.to), _listed(options.formats)
    check_pictures(formats, options.width, options.dpi)
    for name in figures if options.to is not None else ():
        for ending in ("html", *formats):
            check_output(folder / f"{name}.{ending}")
    for name, text in standalone(figures).items():
        write_text(folder / name, text)
    print(f"{folder}: {len(figures)} figures as HTML")
    if not formats:
        return 0
    with progress("figures") as shown:
        files = pictures(figures, formats, width=options.width, dpi=options.dpi, on_progress=shown.on_progress)
    for name, content in files.items():
        write_bytes(folder / name, content)
    print(f"{folder}: {len(figures)} figures as {', '.join(formats)}, {options.width:g} mm wide")
    for name, figure in figures.items():
        if (points := print_size(figure, options.width)[2]) < LEGIBLE:
            print(f"{name}: its text has {points:.1f} points at this width; a larger --width makes it larger")
    return 0


def _listed(text: str) -> list[str]:
    return [each.strip() for each in text.split(",") if each.strip()]


COMMANDS = {"figures": Command("a report's figures as PNG, SVG, PDF and HTML, for print", _add_figures, _figures)}
