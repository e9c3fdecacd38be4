"""Tests: what is promised, and by which of them, is in README.md. A package for ``python -m tests.mutants`` alone."""
