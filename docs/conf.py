"""How Sphinx builds these pages; `make docs` runs it, and any warning ends it."""

import sys
from importlib.metadata import version as version_of
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "_extensions"))

project = "divergent-tokens"
author = "The divergent-tokens authors"
version = release = version_of("divergent-tokens")
language = "en"

extensions = ["myst_parser", "sphinx.ext.autodoc", "command_tables", "record_tables", "offline"]
exclude_patterns = ["_build", "_extensions"]
nitpicky = True

myst_heading_anchors = 4
myst_links_external_new_tab = False

# In docstrings of this project `name` is code, as it is in Markdown.
default_role = "literal"
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 80
# What is documented elsewhere has no page here, and no index is fetched when the pages are built.
nitpick_ignore_regex = [
    ("py:.*", r"(numpy|np|torch|pathlib|collections|typing|os|contextlib|rich|transformers)\..*"),
]

html_theme = "furo"
html_title = f"divergent-tokens {release}"
html_show_sourcelink = False
html_copy_source = False
