"""The website: the course, the guides and the reference as static pages, by Sphinx.

``python -m notebooks.website`` writes it to ``build/website``, and fails if a link or a name in code leads nowhere.
"""
