"""Every score: the loss on held-out data, HellaSwag, and two models side by side.

Read validation, hellaswag, compare.
"""
