"""Evaluation of the recipes: prompts, generation, and the scores of GSM8K, HumanEval and MT-Bench.

Modules, from the bottom up: ``records`` (files of JSON lines), ``accuracy`` (shares with their interval), ``prompts`` and
``tokenization`` (what a model reads and learns), ``generate`` and ``answers`` (what it answers), ``gsm8k``, ``sandbox`` and
``humaneval``, ``judge`` and ``mtbench``. A recipe that is run as a script imports them as ``support.evaluation``.
"""
