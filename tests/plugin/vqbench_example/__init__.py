"""A package of somebody else, installed as far as Python can tell: what docs/extending.md says of packages."""
