"""What a run shows to people: its pictures.

Read logged_run, pictures.
"""
