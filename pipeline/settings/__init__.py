"""Every setting of every stage and command: frozen dataclasses, standard library only.

The docstring under a field is its `--help` text: unit, meaning of special values, source. Importing these
does not import torch: `--help` answers at once, and other modules import their settings at the top.
"""
