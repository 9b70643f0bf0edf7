"""Real models and data for the recipes, built once from wheels on PyPI and kept in a local cache."""
