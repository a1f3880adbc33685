"""The pieces that the scripts of gpt2repro share: one file, one job. Nothing here imports a script or the model."""
