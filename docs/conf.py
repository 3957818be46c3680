"""How the documentation is built (``make docs``). Nothing is fetched, by the build or by a reader's browser."""

import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).parent / "extensions"))

project = "position-probe"
author = "the authors of position-probe"
html_title = "position-probe"
html_theme = "furo"
html_copy_source = False
html_show_copyright = False
html_static_path = ["static"]
html_css_files = ["pages.css"]

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "mathml",
    "docstrings",
    "public_names",
    "generated",
]
exclude_patterns = ["_build", "released", "generalization", "extrapolation"]

myst_enable_extensions = ["amsmath", "attrs_inline", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_inherit_docstrings = False  # what a base class says is said there
autodoc_preserve_defaults = True
napoleon_google_docstring, napoleon_numpy_docstring = True, False
napoleon_custom_sections = [("Quantities", "params_style")]  # of what constructions claim
add_module_names = False
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88
toc_object_entries_show_parents = "hide"

# Types of other packages stand in signatures without a link: nothing here may need a network.
nitpick_ignore_regex = [("py:.*", r"(?!probe\.|constructions\.).*")]
