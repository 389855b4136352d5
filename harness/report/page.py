"""The report as one page: everything inside, nothing fetched."""

from importlib import metadata

from jinja2 import Environment, PackageLoader, StrictUndefined

from harness.report.figures import DRAWN
from harness.report.model import Report
from harness.report.sections import sections
from harness.report.style import Picture


def page(report: Report, pictures: list[Picture]) -> str:
    """The whole page as HTML, with its style, script and figures inside."""
    environment = Environment(
        loader=PackageLoader("harness.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    drawn = [(picture.group, picture.svg(), picture.caption) for picture in pictures]
    return environment.get_template("page.html").render(
        sections=sections(report),
        figures=drawn,
        undrawn=len(report.groups) > DRAWN,
        version=metadata.version("neqbench"),
    )
