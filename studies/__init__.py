"""One study per file: what is swept, over which backbones and seeds. ``python -m studies.NAME --help`` explains it."""
