"""GPT-2, reproduced faithfully inside the Hugging Face ecosystem: the pieces that the scripts share.

Read upward: recipe, errors, files, processes and run_folder on the ground floor; then data/, prepare/, models/,
evaluation/, train/ and hub/. Each room imports from those before it only; tests/test_structure.py keeps it so.
"""
