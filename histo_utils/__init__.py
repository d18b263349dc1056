"""Searching Tissue: shared parts of the book's chapters.

Importing the package does nothing; import the module that holds the concept
(``from histo_utils.slides import open_slide``).
"""
