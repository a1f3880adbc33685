"""Publishing to the Hugging Face Hub.

Read model_card, upload.
"""
