"""What a run leaves behind: folders, provenance, tables and pictures.

Nothing here is imported by the rest of the package, and rich and matplotlib are imported when something is drawn.
"""
