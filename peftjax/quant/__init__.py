"""Number formats of frozen kernels, and the one product that knows them."""
