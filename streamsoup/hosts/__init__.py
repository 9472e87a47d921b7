"""streamsoup inside other packages: one adapter a module, imported by whoever has the package.

`averaged_model` (torch), `transformers`, `lightning`. See docs/embedding.md.
"""
