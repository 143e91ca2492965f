"""What a prior holds, shown to people.

verdict    a prior in plain words, with the origin of its thresholds
summary    a prior in numbers: groups by layer, kind and projection, spectra
tables     tables of priors
plot       the figure of a prior
page       its page; page.html is the template
"""

from .page import write_report
from .summary import prior_summary
from .tables import prior_html, prior_table

__all__ = ["prior_html", "prior_summary", "prior_table", "write_report"]
