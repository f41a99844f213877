"""Glue for trainers and checkpoints of other libraries; each module is imported on its own."""
