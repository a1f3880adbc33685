"""What a run shows to people: its pictures, its report, and a demo of its model.

Read logged_run, public, pictures, page, space.
"""
