"""What surrounds the training loop of train_accelerate.py.

Read command_line, preflight, recipe_change, rendezvous, launch, micro_batch and attention (before the first step);
run_state, guard, early_stopping and stopping (what steers the loop); optimizers with muon, and schedule; evaluations;
checkpoint with checkpoint_files; telemetry with metrics, speed and tracker; report (after the last step).
"""
