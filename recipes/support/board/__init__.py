"""The protocol of PEFT's method comparison on MetaMathQA, which ``recipes/peft_board.py`` runs.

Written after ``method_comparison/MetaMathQA`` (``run.py``, ``utils.py``, ``data.py``, ``default_training_params.json``) of
huggingface/peft, commit 5d602fdb of August 2026. The tests name the file that each number comes from.
"""
