"""Code that does not depend on models or data.

Errors, the machinery of config files, names and types of parameters, the terminal, files, signals, and several processes.
Nothing here imports another part of peftjax.
"""
