"""Every score: the loss on held-out data, HellaSwag, two models side by side, and what is known to compare them with.

Read validation, multiple_choice, hellaswag, perplexity, lambada, detokenizers, task_data, bootstrap, compare;
reference_curves and verdict.
"""
