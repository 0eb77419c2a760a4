"""Floor 0: configuration, errors, parameter names and types. Imports no other part of peftjax."""
