"""What checkpoints hold, whatever form they come in: Hugging Face folders, ids on the hub, LAVIS files."""
