"""One HTML file to look at a build: what was measured, every pair of answers, layers and weights.

`render_report` is a pure function of what builds measured. The file needs no network: styles,
scripts, data and the plotting library are in it (Observable Plot and d3, `plot/`: both ISC, half a
megabyte, drawn as SVG in the colours of the page). It holds prompts and answers, so it is private.

What a model wrote is text and nothing else: templates escape every string, data is JSON in which no
`<` occurs, scripts put it on the page as text nodes, and the page's own content security policy
runs no script but those written here.

    path.write_text(render_report([build]), encoding="utf-8")
"""

from __future__ import annotations

from abliterator.report._build import Build, SamplePair
from abliterator.report._page import render_report

__all__ = ["Build", "SamplePair", "render_report"]
