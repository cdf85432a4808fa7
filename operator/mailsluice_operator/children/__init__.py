"""Pure builders of child objects: a resource and what it refers to in, plain dicts out."""
