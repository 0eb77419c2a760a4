"""The report of a run: one HTML page that needs nothing else, made of what the workdir holds."""
