"""What the recipes share: run folders, provenance, tables, pictures and advice.

A recipe is run as a script, so its own folder is the first that Python imports from: `from support.tables import Table`.
"""
