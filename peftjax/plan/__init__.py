"""The plan command: does the train step of a config fit a device that is not attached, and how fast can it be?

What belongs here: the step built from shapes alone, its cost counted from the jaxpr and from the compiled program, the
devices and their compilers, and the tables that show the result. Nothing here loads weights or trains.
"""
