"""What goes to the Hugging Face Hub: model_card and upload."""
