"""Settings of Sphinx. A description of each is at https://www.sphinx-doc.org/en/master/usage/configuration.html"""

project = "fxtrain"
extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "myst_nb",
    "sphinx_copybutton",
    "notebooks.website._cross_references",
]

autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
maximum_signature_line_length = 80
napoleon_numpy_docstring = False
toc_object_entries_show_parents = "hide"

nb_execution_mode = "off"
suppress_warnings = ["misc.highlighting_failure"]  # messages of errors in tracebacks are text, not Python
myst_heading_anchors = 3
copybutton_prompt_text = r">>> |\.\.\. "
copybutton_prompt_is_regexp = True

html_theme = "furo"
html_title = "fxtrain"
html_show_sphinx = False
html_show_copyright = False
html_copy_source = False
html_theme_options = {"navigation_with_keys": True}
html_static_path = ["style.css"]
html_css_files = ["style.css"]
pygments_dark_style = "one-dark"
highlight_language = "text"
