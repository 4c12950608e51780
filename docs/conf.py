"""Configuration of the documentation, which Sphinx builds:

python -m sphinx -W --keep-going -b html docs docs/_build/html
"""

from __future__ import annotations

import sys
from pathlib import Path

import xprnn

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

project = "xprnn"
author = "the authors of xprnn"
release = version = xprnn.__version__

extensions = [
    "mathml",
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx_argparse_cli",
    "sphinx_copybutton",
    "sphinx_gallery.gen_gallery",
]
templates_path = ["_templates"]
exclude_patterns = ["_build", "examples", "renames"]
default_role = "py:obj"  # a name in single backticks: a link, where it is documented
needs_sphinx = "9.0"
highlight_language = "none"  # of blocks that name none, such as equations

myst_enable_extensions = ["dollarmath", "deflist"]
myst_heading_anchors = 3

autodoc_default_options = {"undoc-members": True}
autodoc_member_order = "groupwise"  # methods, then attributes
autodoc_typehints = "none"  # the text gives shapes and dtypes, which types do not

copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

sphinx_gallery_conf = {
    "examples_dirs": "examples",
    "gallery_dirs": "gallery",
    "filename_pattern": r"\.py$",  # every script runs, also one that draws nothing
    "within_subsection_order": "FileNameSortKey",
    "download_all_examples": False,
    "show_signature": False,
    "write_computation_times": False,
    "abort_on_example_error": True,
    "image_scrapers": ("matplotlib",),
}

html_theme = "pydata_sphinx_theme"
html_title = f"xprnn {release}"
html_static_path = ["_static"]
html_css_files = ["xprnn.css"]
html_math_renderer = "mathml"
html_copy_source = False
html_show_search_summary = False  # read with requests, which pages opened as files may not make
html_sidebars = {  # of pages that are not in a section: none
    path.stem: [] for path in Path(__file__).parent.glob("*.md")
}
html_context = {"default_mode": "auto"}  # light or dark, as the system
html_theme_options = {
    "logo": {"text": "xprnn"},
    "header_links_before_dropdown": 6,
    "show_toc_level": 2,
    "navigation_with_keys": False,
    "footer_start": ["copyright"],
    "footer_end": [],
    "secondary_sidebar_items": ["page-toc"],
}
copyright = "the authors of xprnn, Apache License 2.0"
