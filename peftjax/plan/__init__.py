"""Will it fit, and how fast could it be: the train step of a config, compiled for devices that need not be there."""
