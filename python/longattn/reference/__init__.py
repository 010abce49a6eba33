"""The specification of every method: float64 numpy, straight from the formula, slow and readable.

One module per family or method, with the names and arguments of the public functions.
"""
