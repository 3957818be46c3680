"""Formulas as MathML, which browsers draw by themselves: no script, no fonts, no network."""

from docutils import nodes
from docutils.utils.math import MathError
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx
from sphinx.util import logging

LOGGER = logging.getLogger(__name__)


def _mathml(translator, node: nodes.Element, display: bool) -> None:
    try:
        markup = tex2mathml(node.astext(), as_block=display)
    except MathError as error:
        LOGGER.warning("formula %r: %s", node.astext(), error, location=node)
        raise nodes.SkipNode from None
    translator.body.append(f'<div class="formula">{markup}</div>' if display else markup)
    raise nodes.SkipNode


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_html_math_renderer(
        "mathml",
        (lambda self, node: _mathml(self, node, display=False), None),
        (lambda self, node: _mathml(self, node, display=True), None),
    )
    app.config.html_math_renderer = "mathml"
    return {"parallel_read_safe": True, "parallel_write_safe": True}
