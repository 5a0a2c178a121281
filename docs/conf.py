"""How Sphinx makes the pages of this folder and those of the docstrings into one site:

pip install "qllm[docs]" && sphinx-build -W docs build/docs
"""

import qllm

project = "qllm"
release = qllm.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc"]
exclude_patterns = ["performance.json"]
html_theme = "alabaster"
html_static_path = []
html_theme_options = {"description": "what quantization does to a language model"}

# the pages are read on their own, too, so that links lead to files and headings as they stand there
myst_heading_anchors = 4
suppress_warnings = ["myst.xref_missing", "myst.header"]

# docstrings are plain text with code in single backticks
default_role = "code"
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
