"""GPT-2, reproduced faithfully inside the Hugging Face ecosystem: the pieces that the scripts share.

On the ground floor errors, files, launcher, processes, recipe, recipe_file, model_fields and run_folder; above them
the rooms data, prepare, models, evaluation, show, train and hub. Each imports from those below it only: docs/design.md
has the drawing.
"""
