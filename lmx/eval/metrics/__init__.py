"""Measures of answers against what was expected, each with its standard error."""
