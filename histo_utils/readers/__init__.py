"""Readers of published layouts, one file per layout."""
