"""The laws of the house, checked by reading the source: nothing here imports the package."""
