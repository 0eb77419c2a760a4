"""The kinds of tasks, one per file, each with its data, its loss and its metrics."""
