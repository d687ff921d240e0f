"""From a reference to an imported module: all input and output of the client is in this package."""
