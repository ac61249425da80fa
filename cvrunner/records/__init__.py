"""Files of a run: typed records, folder layout, journal, model folders, and names of earlier versions."""
