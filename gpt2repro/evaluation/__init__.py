"""Every score: the loss on held-out data, HellaSwag, perplexities, LAMBADA; two models side by side; and what is known
to compare them with.

Read validation, rows, multiple_choice, hellaswag with hellaswag_items, perplexity, lambada, detokenizers, task_data;
then bootstrap, task, tasks, score_cache, published, scorecard, scorecard_views; compare; reference_curves, verdict.
"""
