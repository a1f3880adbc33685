"""What surrounds the training loop of train_accelerate.py.

Read preflight, recipe_change, rendezvous and launch (before the first step); run_state, guard, early_stopping and
stopping (what steers the loop); optimizers and schedule; evaluations; checkpoint; telemetry with metrics, speed and
tracker; report (after the last step).
"""
