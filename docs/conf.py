"""Sphinx configuration of the documentation site: `make docs` builds it without a network.

The source folder is the repository, so that README, DEVELOPERS and the notebooks are pages as they
are, and a link that leads somewhere on GitHub leads there on the site too.
"""

from mor.version import __version__

project = "mor"
author = "The maintainers of mor"
version = release = __version__
root_doc = "docs/index"
include_patterns = ["*.md", "docs/**", "notebooks/*.ipynb"]
# Folders that need not be walked: they hold thousands of files and no page.
exclude_patterns = [".*", "build", "dist", "runs", "shared", "notebooks/runs"]
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]

nb_execution_mode = "off"  # the tests execute the notebooks; the site shows what they kept
myst_heading_anchors = 4

# Docstrings put code into single backticks, as Markdown does.
default_role = "literal"
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
napoleon_custom_sections = ["Reference"]
napoleon_use_ivar = True  # else a field of a dataclass is described twice

html_theme = "furo"
html_title = f"mor {release}"
html_copy_source = False
html_show_copyright = False  # the licence is on the first page
