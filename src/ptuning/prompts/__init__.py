"""What is trained, saved and shared: template, task, encoder, prompt and their files."""
