"""What a run shows to people: its pictures, and a demo of its model.

Read logged_run, pictures, space.
"""
